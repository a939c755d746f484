"""Problem 08: high compute and power cost."""
