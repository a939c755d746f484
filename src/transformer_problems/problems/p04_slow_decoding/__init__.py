"""Problem 04: slow autoregressive decoding."""
