"""Who may, how much, and what is hidden."""
