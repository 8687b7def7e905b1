"""Nouns, errors, settings and the one plug registry. No I/O, nothing heavy; imports nothing of the project."""
