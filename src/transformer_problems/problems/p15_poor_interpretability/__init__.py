"""Problem 15: poor interpretability."""
