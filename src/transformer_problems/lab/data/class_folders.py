"""Folders whose sub-folders are classes."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformer_problems.core.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class ClassFiles:
    """The files of each class, by its name, and how many files and folders beside them are left out."""

    by_class: dict[str, list[Path]]
    num_left_out: int


def files_by_class(path: Path, suffixes: tuple[str, ...], *, strict: bool = False, flat: bool = False) -> ClassFiles:
    """The files of each class: every one below the sub-folder of that name, however deep.

    Hidden files and folders are skipped. What else is left out, a warning counts: files of other types or in no
    class's folder, folders that cannot be listed, and links to folders, which might lead in circles.

    Args:
        path: A folder with one sub-folder for each class.
        suffixes: In small letters, with the dot; they match capitals too.
        strict: Refuse the folder where anything would be left out.
        flat: Take a folder without sub-folders as one class.

    Raises:
        ArgumentError: If there is no such folder, it has no sub-folders and may not be flat, or one of them holds no
            such file.
    """
    folders, files = entries_of(path)
    if flat and not folders:
        folders, files = [path], []
    if not folders:
        raise ArgumentError(f"path must hold a sub-folder for each class; {path} has none. Sort its files into some.")
    by_class: dict[str, list[Path]] = {}
    left_out = [f"{file} (in no class's folder)" for file in files]
    for folder in folders:
        found = list(_below(folder, suffixes))
        by_class[folder.name] = [file for file, reason in found if not reason]
        left_out += (beside := [f"{file} ({reason})" for file, reason in found if reason])
        if not by_class[folder.name]:
            raise ArgumentError(
                f"every sub-folder of path must hold {' or '.join(suffixes)} files; {folder} holds none"
                f"{f', but {beside[0]}' if beside else ''}. Add some or remove it."
            )
    tell_left_out(left_out, suffixes, path, strict=strict)
    return ClassFiles(by_class, len(left_out))


def entries_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files that a folder holds, hidden ones left out, by name.

    Raises:
        ArgumentError: If there is no such folder, or it cannot be listed.
    """
    try:
        if not path.is_dir():
            raise ArgumentError(f"path must be an existing folder; got {path}.")
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        are_folders = [entry.is_dir() for entry in entries]
    except OSError as error:
        raise ArgumentError(f"path must be a folder that can be listed; {path} cannot ({error}). Open it.") from error
    folders = [entry for entry, is_folder in zip(entries, are_folders, strict=True) if is_folder]
    return folders, [entry for entry, is_folder in zip(entries, are_folders, strict=True) if not is_folder]


def tell_left_out(left_out: list[str], suffixes: tuple[str, ...], path: Path, *, strict: bool) -> None:
    """Warn of files and folders that are none to be read, or refuse them.

    Args:
        left_out: Each with the reason.

    Raises:
        ArgumentError: In strict mode, if there are any.
    """
    if not left_out:
        return
    if strict:
        raise ArgumentError(
            f"path must hold {' or '.join(suffixes)} files in readable folders and nothing else where that is strict; "
            f"{left_out[0]} is among {len(left_out)} that would be left out. Move it away, or leave strict out."
        )
    warnings.warn(
        f"{len(left_out)} files or folders of {path} left out that are no {' or '.join(suffixes)} files to be read, "
        f"first {left_out[0]}",
        stacklevel=4,
    )


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


def _below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Everything below a folder by name, with the reason where it is left out."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"cannot be listed: {error.strerror}"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(folder / entry.name, suffixes)
        else:
            yield folder / entry.name, _reason_against(entry, suffixes)


def _reason_against(entry: "os.DirEntry[str]", suffixes: tuple[str, ...]) -> str:
    """Why an entry is no file to be read; empty where it is one."""
    try:
        if entry.is_dir():
            return "a link to a folder"
        if not entry.is_file():
            return "no file that exists"
    except OSError as error:
        return f"cannot be reached: {error.strerror}"
    return "" if Path(entry.name).suffix.lower() in suffixes else "of another type"
