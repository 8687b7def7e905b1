"""The lifecycle API at /api/v1, one file a noun."""
