"""Problem 01: attention costs the square of the sequence length."""
