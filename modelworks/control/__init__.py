"""Use cases, and making what is observed equal what is desired."""
