"""The work plane: take one leased job, produce artifacts, commit once."""
