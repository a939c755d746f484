"""Meters: how long, how much memory, how many operations, how good."""
