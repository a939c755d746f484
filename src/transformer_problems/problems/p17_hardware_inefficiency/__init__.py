"""Problem 17: hardware inefficiency."""
