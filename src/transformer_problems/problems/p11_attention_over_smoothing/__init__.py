"""Problem 11: attention over-smoothing."""
