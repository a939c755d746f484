"""Models made smaller: weights shared, removed or rounded."""
