"""Passages and their vectors on disk, as JSON and raw numbers: reading them executes nothing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_problems.core.errors import ArgumentError, OutputError

_FORMAT, _VERSION = "transformer-problems passages", 1
_PASSAGES, _VECTORS = "passages.json", "vectors.f32"  # vectors: little-endian float32, row after row


def write_passages(folder: Path | str, kind: str, passages: list[str], vectors: NDArray[np.float32]) -> None:
    """Save passages and one vector for each, [n, d] with d = 0 where there are none.

    Each file is replaced as a whole, and a digest over both tells later whether they belong together.

    Raises:
        OutputError: If the folder cannot be written.
    """
    raw, dim = vectors.astype("<f4").tobytes(), vectors.shape[1]
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "dim": dim,
        "sha256": _digest(kind, dim, passages, raw),
        "passages": passages,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / _VECTORS, raw)
        _replace(folder / _PASSAGES, json.dumps(content).encode())
    except OSError as error:
        raise OutputError(f"folder {folder} cannot be written ({error}). Choose a folder that can.") from error


def read_passages(folder: Path | str, kind: str) -> tuple[list[str], NDArray[np.float32]]:
    """What `write_passages` saved under the same kind.

    Raises:
        ArgumentError: If the folder holds no whole index of that kind.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / _PASSAGES).read_bytes())
        raw = (folder / _VECTORS).read_bytes()
        found, passages, dim, digest = _parts(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(folder, f"cannot be read: {type(error).__name__}: {error}") from error
    if found != kind:
        raise _broken(folder, f"holds a {found!r} index, not a {kind!r} one")
    if len(raw) != 4 * dim * len(passages) or digest != _digest(kind, dim, passages, raw):
        raise _broken(folder, "is damaged: its files do not match their checksum")
    vectors = np.frombuffer(raw, dtype="<f4").reshape(len(passages), dim)
    return passages, vectors.astype(np.float32)


def _parts(content: dict[str, Any]) -> tuple[str, list[str], int, str]:
    if (content["format"], content["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"not written as {_FORMAT}, version {_VERSION}")
    passages, dim = content["passages"], content["dim"]
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise TypeError("passages must be a list of strings")
    if not isinstance(dim, int) or dim < 0:
        raise TypeError("dim must be a whole number")
    return content["kind"], passages, dim, content["sha256"]


def _digest(kind: str, dim: int, passages: list[str], raw: bytes) -> str:
    return hashlib.sha256(json.dumps([kind, dim, passages]).encode() + raw).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _broken(folder: Path, what: str) -> ArgumentError:
    return ArgumentError(f"folder must hold a whole index; {folder} {what}. Build the index again and save it.")
