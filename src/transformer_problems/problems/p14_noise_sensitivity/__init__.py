"""Problem 14: sensitivity to noise tokens."""
