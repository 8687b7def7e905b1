"""Modelworks: make models and put them to work. `from modelworks import Client`."""
