"""What a model is examined on: the user's own texts or images, or those that every machine has."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.image_folder import load_image_folder
from transformer_problems.lab.data.text import load_text

_SHORTEST = 1_000  # characters of all texts together
_MOST_BYTES = 50_000_000  # read of the user's texts: far more than a check-up looks at
_PAGE = 3_000  # characters that the machine's own sources are cut into, as long as a page
_IMAGE_SIDE = 384
_NUM_CROPS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Texts or images, and where they come from.

    Args:
        texts: Of a model of text, in their order.
        images: Of a model of images, [n, 3, side, side] from 0 to 1.
        classes: Of the images, [n], where the user sorted them.
        own: Whether they are the user's, so that their lengths tell something.
    """

    source: str
    texts: tuple[str, ...] = ()
    images: Tensor | None = None
    classes: Tensor | None = None
    own: bool = False


def own_texts(path: Path) -> Material:
    """Texts in UTF-8: each line of a file that is not empty, or each file below a folder.

    Raises:
        ArgumentError: If there is nothing to read, or a file is empty, binary, or in another encoding.
    """
    if not path.exists():
        raise ArgumentError(f"--data must be an existing file or folder; {path} is none. Check the path.")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        if not files:
            raise ArgumentError(f"--data must hold text files; {path} holds none. Name another folder or a file.")
        texts = tuple(_read(file) for file in files)
    else:
        texts = tuple(line for line in _read(path).splitlines() if line.strip())
    _require_enough(texts, str(path))
    return Material(str(path), texts=texts, own=True)


def machines_texts() -> Material:
    """The standard library's sources that no bundled model was trained on, in pieces of a page."""
    splits = load_text()
    whole = splits.test.numpy().tobytes().decode("utf-8", errors="replace")
    pages = tuple(whole[start : start + _PAGE] for start in range(0, len(whole), _PAGE))
    return Material(splits.source, texts=pages)


def own_images(path: Path) -> Material:
    """The images in a folder's sub-folders, or beside each other in a folder, as squares.

    Raises:
        ArgumentError: If there is no image to read.
    """
    if not path.is_dir():
        raise ArgumentError(
            f"--data must be a folder of images for a model of images; {path} is none. Name such a folder."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is left out changes no reading
        found = load_image_folder(path, size=_IMAGE_SIDE, flat=True)
    return Material(str(path), images=found.pixels.float() / 255, classes=found.classes, own=True)


def machines_images() -> Material:
    """Square pieces of the two photographs that come with scikit-learn, near and far."""
    from sklearn.datasets import load_sample_images  # 40 MB of memory, which models of text need not pay

    rng = np.random.default_rng(0)
    pieces = []
    photographs = [torch.from_numpy(np.array(image)).movedim(-1, 0) for image in load_sample_images().images]
    for number in range(_NUM_CROPS):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[1:]
        side = int(rng.integers(64, min(height, width) + 1))
        top, left = (int(rng.integers(0, most - side + 1)) for most in (height, width))
        piece = photograph[None, :, top : top + side, left : left + side].float() / 255
        pieces.append(torch.nn.functional.interpolate(piece, (_IMAGE_SIDE, _IMAGE_SIDE), mode="bilinear"))
    return Material("two photographs that come with scikit-learn", images=torch.cat(pieces).clamp(0, 1))


def _read(file: Path) -> str:
    if file.stat().st_size > _MOST_BYTES:
        raise ArgumentError(
            f"--data must hold files of at most {_MOST_BYTES // 1_000_000} MB; {file} is larger. Cut a part of it."
        )
    content = file.read_bytes()
    if b"\0" in content:
        raise ArgumentError(f"--data must be text; {file} is binary (it contains a NUL byte). Leave it out.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"--data must be UTF-8 text; {file} is not (byte {error.start:,}). Convert it, as with iconv -t UTF-8."
        ) from error
    if not text.strip():
        raise ArgumentError(f"--data must hold text; {file} is empty. Leave it out or name another.")
    return text


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _require_enough(texts: tuple[str, ...], source: str) -> None:
    length = sum(map(len, texts))
    if length < _SHORTEST:
        raise ArgumentError(
            f"--data must hold {_SHORTEST:,} characters or more to examine a model on; {source} holds {length:,}. "
            "Add text, or leave --data out."
        )
