"""Ways to train: what to learn from, and what to keep in memory meanwhile."""
