"""Splits, metrics with intervals, comparison and gates."""
