"""Problem 18: real-time deployment."""
