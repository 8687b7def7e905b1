"""The edges, one file a dialect."""
