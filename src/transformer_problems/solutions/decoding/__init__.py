"""Ways to turn a model's predictions into text, and the caches that make it quick."""
