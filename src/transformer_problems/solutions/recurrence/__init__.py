"""Mixers that carry a state from one stretch of the sequence to the next."""
