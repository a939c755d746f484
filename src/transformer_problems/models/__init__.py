"""Whole networks assembled from the library's parts."""
