"""Compiled answers to single operations, each beside a PyTorch path with the same result."""
