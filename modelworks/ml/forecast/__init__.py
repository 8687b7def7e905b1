"""Forecasts of a series from its own past: windows, the two baselines, rolling origins, and the package."""
