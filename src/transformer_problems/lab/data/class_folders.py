"""Folders whose sub-folders are classes."""

import warnings
from pathlib import Path

from transformer_problems.core.errors import ArgumentError


def files_by_class(path: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each class: every one below the sub-folder of that name, however deep; hidden ones are skipped.

    Args:
        path: A folder with one sub-folder for each class.
        suffixes: In small letters, with the dot; they match capitals too.

    Raises:
        ArgumentError: If there is no such folder, it has no sub-folders, or one of them holds no such file.
    """
    folders = [entry for entry in entries_of(path) if entry.is_dir()]
    if not folders:
        raise ArgumentError(f"path must hold a sub-folder for each class; {path} has none. Sort its files into some.")
    files = {folder.name: _files_below(folder, suffixes) for folder in folders}
    for name, found in files.items():
        if not found:
            raise ArgumentError(
                f"every sub-folder of path must hold {' or '.join(suffixes)} files; {path / name} holds none. "
                "Add some or remove it."
            )
    return files


def entries_of(path: Path) -> list[Path]:
    """What a folder holds, hidden files left out, by name.

    Raises:
        ArgumentError: If there is no such folder, or it cannot be listed.
    """
    if not path.is_dir():
        raise ArgumentError(f"path must be an existing folder; got {path}.")
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ArgumentError(f"path must be a folder that can be listed; {path} cannot ({error}).") from error


def check_left_out(kind: str, skipped: list[str], found: set[int], class_names: tuple[str, ...], path: Path) -> None:
    """Warn of files that were left out, and refuse a class that lost all of its own.

    Args:
        kind: What they should have been, e.g. "images".
        skipped: Each file with the reason.
        found: Indices of the classes of which one could be read.

    Raises:
        ArgumentError: If there is a class without a readable file.
    """
    if not skipped:
        return
    for index, name in enumerate(class_names):
        if index not in found:
            raise ArgumentError(
                f"every class must have a file that can be read; {path / name} has none, of {len(skipped)} unreadable "
                f"{kind}, first {skipped[0]}. Replace its files."
            )
    warnings.warn(f"{len(skipped)} unreadable {kind} of {path} left out, first {skipped[0]}", stacklevel=3)


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    below = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return sorted(file for file in below if not any(part.startswith(".") for part in file.relative_to(folder).parts))
