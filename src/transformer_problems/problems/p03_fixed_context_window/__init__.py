"""Problem 03: fixed context window."""
