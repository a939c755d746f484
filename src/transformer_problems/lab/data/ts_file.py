"""Labelled sequences from the .ts files of the UEA and UCR time series archives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.labelled import LabelledSequences


@dataclass(frozen=True, slots=True)
class _Header:
    class_names: tuple[str, ...]
    num_features: int | None  # where the file says so
    num_lines: int


def load_ts(path: Path | str, *, progress: Callable[[float], None] | None = None) -> LabelledSequences:
    """Every case of a file, of equal or unequal lengths, in the file's order.

    A header of lines that begin with "@" ends with @data; then each line is a case, its dimensions separated by ":"
    and the values of each by ",", with the class at the end. Lines that begin with "#" are comments. Spaces and tabs
    are alike.

    Args:
        path: A .ts file without time stamps and missing values, of a classification task.
        progress: Called with the share of the lines done.

    Raises:
        ArgumentError: If the file is missing or not as described; the message names the line.
    """
    path = Path(path)
    lines = _read(path)
    header = _header(path, lines)
    sequences: list[Tensor] = []
    classes: list[int] = []
    num_features = header.num_features
    for number, line in enumerate(lines[header.num_lines :], start=header.num_lines + 1):
        if line and not line.startswith("#"):
            *dimensions, label = (part.strip() for part in line.split(":"))
            if label not in header.class_names:
                raise _bad_line(path, number, f"the class {label!r} is not among those of @classLabel")
            sequences.append(_sequence(path, number, dimensions, num_features))
            classes.append(header.class_names.index(label))
            num_features = len(dimensions)
        if progress is not None:
            progress(number / len(lines))
    if not sequences:
        raise ArgumentError(f"path must be a .ts file with cases; {path} has no line after @data. Fetch it again.")
    return LabelledSequences.padded(sequences, classes, header.class_names)


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise ArgumentError(f"path must be an existing .ts file; got {path}.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"path must be a .ts file, which is text; {path} cannot be read ({error}).") from error
    if not any(lines):
        raise ArgumentError(f"path must be a .ts file with a header and cases; {path} is empty. Fetch it again.")
    return lines


def _header(path: Path, lines: list[str]) -> _Header:
    entries: dict[str, str] = {}
    num_lines = 0
    for num_lines, name, value in _entries(lines):
        if name in entries:
            raise _bad_line(path, num_lines, f"{name} comes a second time")
        entries[name] = value
    if "@data" not in entries:
        raise ArgumentError(f"path must be a .ts file with a line @data; {path} has none. Choose another file.")
    for name in ("@timestamps", "@missing"):
        if entries.get(name, "").lower() == "true":
            raise ArgumentError(f"path must be without {name[1:]}; {path} says {name} true. Choose another file.")
    has_classes, *class_names = entries.get("@classlabel", "false").split() or ["false"]
    if has_classes.lower() != "true" or not class_names:
        raise ArgumentError(
            f"path must list its classes, as in @classLabel true yes no; {path} does not. Choose a file of a "
            "classification task."
        )
    if twice := sorted({name for name in class_names if class_names.count(name) > 1}):
        raise ArgumentError(f"@classLabel must name each class once; {path} repeats {twice[0]!r}. Remove one of them.")
    dimensions = entries.get("@dimensions", "")
    if dimensions and not dimensions.isdecimal():
        raise ArgumentError(f"@dimensions must be a whole number; {path} says {dimensions!r}. Fetch it again.")
    return _Header(tuple(class_names), int(dimensions) if dimensions else None, num_lines)


def _entries(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Numbers, names in small letters, and values of the header's lines, the last of which is @data."""
    for number, line in enumerate(lines, start=1):
        if line.startswith("@"):
            name, *value = line.split(maxsplit=1)
            yield number, name.lower(), "".join(value)
            if name.lower() == "@data":
                return


def _sequence(path: Path, number: int, dimensions: list[str], num_features: int | None) -> Tensor:
    """One case, [N, F] float32, with F as of the header or else of the first case."""
    if not dimensions or len(dimensions) != (num_features or len(dimensions)):
        raise _bad_line(path, number, f"it has {len(dimensions)} dimensions, not {num_features or 'one or more'}")
    try:
        values = [[float(value) for value in dimension.split(",")] for dimension in dimensions]
    except ValueError as error:
        raise _bad_line(path, number, str(error)) from error
    lengths = sorted({len(dimension) for dimension in values})
    if len(lengths) > 1:
        raise _bad_line(path, number, f"its dimensions have from {lengths[0]} to {lengths[-1]} values, not one number")
    sequence = torch.tensor(values).T
    if not sequence.isfinite().all():
        raise _bad_line(path, number, "it holds a value that is not finite")
    return sequence


def _bad_line(path: Path, number: int, reason: str) -> ArgumentError:
    return ArgumentError(f"path must be a whole .ts file; in line {number} of {path} {reason}. Fetch or mend it.")
