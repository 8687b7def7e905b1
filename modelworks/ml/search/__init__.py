"""The search for hyperparameters and algorithms: what to try, what a trial gave, and which was best."""
