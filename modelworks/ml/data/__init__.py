"""Tables in: read, check, type, profile, and turn into batches."""
