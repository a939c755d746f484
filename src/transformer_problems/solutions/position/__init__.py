"""Position encodings: what tells a model where a token stands."""
