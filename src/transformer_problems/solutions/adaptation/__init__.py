"""A trained model learns one more task in few weights of its own."""
