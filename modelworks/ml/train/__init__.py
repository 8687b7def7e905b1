"""Trainers: one file a family, hyperparameters declared as data."""
