"""A short hash of the code that makes a result, so that old results are never taken for new ones."""

import hashlib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

_MAKERS = ("core", "kernels", "solutions", "models", "lab")


@cache
def code_fingerprint(room: str) -> str:
    """Hash of the floors below the problems and of one room, e.g. "p01_quadratic_complexity"."""
    digest = hashlib.sha256()
    package = resources.files("transformer_problems")
    for folder in (*(package / name for name in _MAKERS), package / "problems" / room):
        for file in _sources(folder):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _sources(folder: Traversable) -> list[Traversable]:
    found: list[Traversable] = []
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            found += _sources(entry)
        elif entry.name.endswith(".py"):
            found.append(entry)
    return found
