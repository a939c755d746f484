"""The single source of truth: 18 problems, the solutions that treat them, what is claimed and what was measured."""

from transformer_problems.catalogue.entries import (
    Catalogue,
    Criterion,
    Outcome,
    Problem,
    Reference,
    Solution,
    Treatment,
)
from transformer_problems.catalogue.reader import load_catalogue

__all__ = [
    "Catalogue",
    "Criterion",
    "Outcome",
    "Problem",
    "Reference",
    "Solution",
    "Treatment",
    "load_catalogue",
]
