"""Problem 05: no local inductive bias."""
