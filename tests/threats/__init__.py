"""What peers were broken by, tried on the real server. Each file is a class of attacks; each walks the router."""
