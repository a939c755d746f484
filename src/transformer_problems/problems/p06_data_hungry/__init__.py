"""Problem 06: data-hungry architecture."""
