"""Text as bytes, split for training, validation and test, without a download."""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

# Packages that every CPython from 3.11 on installs; `pydoc_data` is the language reference in prose.
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "pydoc_data",
    "re",
    "sqlite3",
    "tomllib",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)
_HELD_OUT = 0.05  # of the bytes, for validation and for test each
_MIN_SPLIT_BYTES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class TextSplits:
    """Bytes of three splits, each one uint8 tensor, and where they come from."""

    train: Tensor
    valid: Tensor
    test: Tensor
    source: str


def load_text(path: Path | str | None = None) -> TextSplits:
    """A corpus of bytes: the Python standard library's own sources, or the caller's text.

    The standard library is some 8 MB of code and English documentation that every machine has, the same for
    one version of Python. Its files, and those of a directory, are ordered by a hash of their relative names;
    whole files go to test until it holds 5% of the bytes, then to validation, the rest to training, so no file
    is in two splits. The largest file always trains, lest it be all of a held-out split (the language reference
    would be). A single file is cut into its first 90%, the next 5% and the last 5%.

    Args:
        path: A text file, or a directory whose files are all text (hidden ones are skipped). Default the
            standard library.

    Raises:
        ArgumentError: If the path is missing, empty, binary, or too short to split.
    """
    if path is None:
        files = _standard_library()
        return _split_by_file(files, f"standard library of Python {platform.python_version()}")
    path = Path(path)
    if path.is_dir():
        return _split_by_file(_files_below(path), str(path))
    if not path.is_file():
        raise ArgumentError(f"path must be an existing text file or directory of text files; got {path}.")
    return _split_by_range(_read_text(path), str(path))


def sample_windows(data: Tensor, *, num: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows at uniformly random places, which may overlap.

    Shape:
        data: [bytes] uint8; output: [num, length] int64.

    Raises:
        ArgumentError: If the data are shorter than a window.
    """
    last = _last_start(data, num, length)
    return _windows(data, torch.randint(last + 1, (num,), generator=generator), length)


def held_out_windows(data: Tensor, *, num: int, length: int) -> Tensor:
    """Evenly spaced windows from the first byte to the last, the same on every call.

    They overlap only if `num * length` exceeds the data.

    Shape:
        data: [bytes] uint8; output: [num, length] int64.

    Raises:
        ArgumentError: If the data are shorter than a window.
    """
    last = _last_start(data, num, length)
    return _windows(data, torch.arange(num) * last // max(num - 1, 1), length)


def _last_start(data: Tensor, num: int, length: int) -> int:
    require_positive_int(num=num, length=length)
    if len(data) < length:
        raise ArgumentError(
            f"length must be at most the {len(data)} bytes of the data; got {length}. Shorten the windows or load "
            "more text."
        )
    return len(data) - length


def _windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    places = starts.to(data.device)[:, None] + torch.arange(length, device=data.device)
    return data[places].long()


def _standard_library() -> dict[str, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [*root.glob("*.py"), *(file for package in _PACKAGES for file in (root / package).rglob("*.py"))]
    names = sorted(file.relative_to(root).as_posix() for file in found if _is_shared(file.relative_to(root)))
    return {name: _read_text(root / name) for name in names}


def _is_shared(file: Path) -> bool:
    """Whether every installation of one Python version has this file, with this content."""
    is_generated = file.name.startswith("_sysconfig") or file.name in ("sitecustomize.py", "usercustomize.py")
    return not is_generated and not {"test", "tests"} & set(file.parts)


def _files_below(directory: Path) -> dict[str, bytes]:
    names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not visible:
        raise ArgumentError(f"path must hold text files; {directory} holds none. Choose another directory or a file.")
    return {name: _read_text(directory / name) for name in visible}


def _read_text(file: Path) -> bytes:
    content = file.read_bytes()
    if b"\0" in content:
        raise ArgumentError(f"path must be text; {file} is binary (it contains a NUL byte). Leave it out.")
    return content


def _split_by_file(files: dict[str, bytes], source: str) -> TextSplits:
    share = _HELD_OUT * sum(map(len, files.values()))
    largest = max(files, key=lambda name: len(files[name]))
    train: list[bytes] = [files[largest]]
    valid: list[bytes] = []
    test: list[bytes] = []
    for name in sorted(files.keys() - {largest}, key=lambda name: hashlib.sha256(name.encode()).digest()):
        unfilled = (split for split in (test, valid) if sum(map(len, split)) < share)
        next(unfilled, train).append(files[name])
    return _checked_splits(b"\n".join(train), b"\n".join(valid), b"\n".join(test), source)


def _split_by_range(text: bytes, source: str) -> TextSplits:
    held_out = int(_HELD_OUT * len(text))
    end = len(text) - 2 * held_out
    return _checked_splits(text[:end], text[end : end + held_out], text[end + held_out :], source)


def _checked_splits(train: bytes, valid: bytes, test: bytes, source: str) -> TextSplits:
    if not (train + valid + test).strip():
        raise ArgumentError(f"path must hold text; {source} is empty. Choose another.")
    shortest = min(len(train), len(valid), len(test))
    if shortest < _MIN_SPLIT_BYTES:
        raise ArgumentError(
            f"path must hold enough text for splits of {_MIN_SPLIT_BYTES:,} bytes or more; the shortest split of "
            f"{source} would hold {shortest:,}. Add text, or join few files into one, which is cut 90/5/5."
        )
    return TextSplits(_tensor(train), _tensor(valid), _tensor(test), source)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)  # a bytearray, because tensors may be written to
