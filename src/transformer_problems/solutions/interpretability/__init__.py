"""Ways to tell what an answer rests on, and measures of how far to trust them."""
