"""Attention ops, and the layers that project into them."""
