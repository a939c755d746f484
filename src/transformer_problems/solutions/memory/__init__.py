"""Memories outside the context window: passages that are looked up, and keys and values that are kept."""
