"""The clinic: a check-up of a real model for each of the 18 problems."""
