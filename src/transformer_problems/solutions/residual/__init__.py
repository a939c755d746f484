"""How a sublayer is joined to its input, and layers to earlier ones."""
