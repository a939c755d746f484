"""Problem 09: quality falls on sequences longer than those of training."""
