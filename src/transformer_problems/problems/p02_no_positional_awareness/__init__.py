"""Problem 02: attention alone cannot tell the order of its tokens."""
