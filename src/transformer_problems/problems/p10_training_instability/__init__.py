"""Problem 10: training instability."""
