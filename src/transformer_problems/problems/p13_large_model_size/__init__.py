"""Problem 13: large model size."""
