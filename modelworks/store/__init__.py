"""Rows and bytes: the catalog (SQLite or Postgres) and the blobs. Knows the nouns, nothing of what they are for."""
