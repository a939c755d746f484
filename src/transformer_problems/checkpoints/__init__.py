"""Checkpoints: a pair of small language models that come with the package."""
