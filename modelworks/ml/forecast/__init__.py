"""Series: read from tables, cut into windows; the two baselines, rolling origins."""
