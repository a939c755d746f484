"""Token reducers: sequences that grow shorter from layer to layer."""
