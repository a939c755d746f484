"""Labelled images from the idx files that MNIST and Fashion-MNIST come in."""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.labelled import LabelledImages

IdxSplit = Literal["train", "test"]
_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def load_idx(path: Path | str, *, split: IdxSplit, progress: Callable[[float], None] | None = None) -> LabelledImages:
    """The images and labels of a split; the classes are named by their numbers.

    Args:
        path: A folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, or t10k-... for the test, each
            packed by gzip (.gz) or not.
        split: "train" or "test".
        progress: Called with the share of the files done.

    Raises:
        ArgumentError: If a file is missing or no idx file of unsigned bytes, or they do not belong together.
        UnknownNameError: If `split` is neither.
    """
    if split not in get_args(IdxSplit):
        raise UnknownNameError("split", str(split), get_args(IdxSplit))
    path = Path(path)
    if not path.is_dir():
        raise ArgumentError(f"path must be an existing folder of idx files; got {path}.")
    tell = progress or (lambda share: None)
    pixels = read_idx(_find(path, f"{_PREFIXES[split]}-images-idx3-ubyte"), num_dims=3)
    tell(0.5)
    classes = read_idx(_find(path, f"{_PREFIXES[split]}-labels-idx1-ubyte"), num_dims=1).long()
    if len(pixels) != len(classes):
        raise ArgumentError(
            f"images and labels must be as many; the {split} files in {path} hold {len(pixels)} and {len(classes)}. "
            "Take both from one data set."
        )
    tell(1.0)
    return LabelledImages(pixels[:, None], classes, tuple(str(i) for i in range(int(classes.max()) + 1)))


def read_idx(file: Path | str, *, num_dims: int) -> Tensor:
    """The array of an idx file of unsigned bytes, packed by gzip or not.

    The format: two zero bytes, the type of the numbers, the number of dimensions, each one's size in four bytes, the
    highest first, and the numbers, the last dimension fastest.

    Raises:
        ArgumentError: If the file cannot be read, is no such file, has other dimensions, or is empty or cut off.
    """
    content = _unpacked(Path(file))
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, num_dims)):
        raise ArgumentError(
            f"{file} must be an idx file of unsigned bytes in {num_dims} dimensions, which begins with "
            f"0000080{num_dims}; it begins with {content[:4].hex() or 'nothing'}. Choose another file."
        )
    start = 4 + 4 * num_dims
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape) or not math.prod(shape):
        raise ArgumentError(
            f"{file} must hold the {' x '.join(map(str, shape))} bytes that it announces, at least one; it holds "
            f"{max(0, len(content) - start)}. Fetch it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _find(path: Path, name: str) -> Path:
    found = [file for file in (path / name, path / f"{name}.gz") if file.is_file()]
    if not found:
        raise ArgumentError(f"path must hold {name} or {name}.gz; {path} holds neither.")
    return found[0]


def _unpacked(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(
            f"{file} must be readable, whole if packed; it is not ({error}). Fetch it again."
        ) from error
