"""Where the norm of a sublayer stands."""
