"""The data plane: answer one call within its deadline."""
