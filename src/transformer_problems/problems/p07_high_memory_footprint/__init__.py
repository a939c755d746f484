"""Problem 07: high memory footprint."""
