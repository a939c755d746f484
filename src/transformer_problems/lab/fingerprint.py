"""What a result depends on, as short hashes, so that results of other code or circumstances are never mixed in."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from transformer_problems.core.records import Environment

_MAKERS = ("core", "kernels", "solutions", "models", "lab", "checkpoints")


@cache
def code_fingerprint(room: str) -> str:
    """Hash of the floors below the problems and of one room, e.g. "p01_quadratic_complexity"."""
    package = resources.files("transformer_problems")
    folders = {name: package / name for name in _MAKERS} | {room: package / "problems" / room}
    return hash_files([file for name, folder in folders.items() for file in _files(folder, name)])


def run_fingerprint(room: str, where: Environment, text: str) -> str:
    """Key of a run's results: its code and device, and a hash of what makes numbers of one code incomparable.

    Args:
        where: The machine; its revision and date are left out.
        text: Source of the text that models are trained on.
    """
    settings = (where.processor, where.threads, where.torch, where.python, text)
    return f"{code_fingerprint(room)}-{where.device}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:6]}"


def folder_fingerprint(folder: Path) -> str:
    """Hash of the names, sizes and last changes of a folder's files, all the way down, where contents are too large."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    known = ((file.relative_to(folder), file.stat()) for file in files)
    listed = [(str(name), stat.st_size, stat.st_mtime_ns) for name, stat in known]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:12]


def hash_files(files: Iterable[tuple[str, Traversable]]) -> str:
    """Hash of files, each with the path that it is known by."""
    digest = hashlib.sha256()
    for path, file in files:
        content = file.read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)  # the length keeps neighbours apart
    return digest.hexdigest()[:12]


def _files(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    """Every file of a folder that is part of the package, of whatever kind."""
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        inner = f"{path}/{entry.name}"
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _files(entry, inner)
        elif entry.is_file():
            yield inner, entry
