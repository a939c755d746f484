"""The library: every solution one module, housed by the role it plays in a Transformer."""
