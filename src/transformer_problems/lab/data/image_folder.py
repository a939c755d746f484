"""Labelled images from a folder that has a sub-folder of PNG or JPEG files for each class."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.class_folders import check_left_out, files_by_class
from transformer_problems.lab.data.labelled import LabelledImages

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# what Pillow raises on damaged files: most are its own, but damaged EXIF entries let the others through
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)


def load_image_folder(
    path: Path | str,
    *,
    size: int,
    strict: bool = False,
    flat: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LabelledImages:
    """Every image below a folder, as colours, scaled to cover a square and cropped to its middle.

    Classes are the sub-folders in the order of their names, and so are the images of each. Files that cannot be read,
    those of other types or in no class's folder, and folders that cannot be listed are left out; how many, warnings
    say. Grey images with 16 bits a pixel are not read.

    Args:
        path: A folder with a sub-folder for each class, itself of any depth. Hidden files are skipped.
        size: Pixels of each side, in the result.
        strict: Refuse the folder at the first file or folder that would be left out.
        flat: Take a folder without sub-folders as one class.
        progress: Called with the share of the files done.

    Raises:
        ArgumentError: If the folder or an image of some class is missing, or in strict mode unreadable.
    """
    require_positive_int(size=size)
    path = Path(path)
    found = files_by_class(path, IMAGE_SUFFIXES, strict=strict, flat=flat)
    files = found.by_class
    total = sum(map(len, files.values()))
    images: list[Tensor] = []
    classes: list[int] = []
    skipped: list[str] = []
    for index, of_class in enumerate(files.values()):
        for file in of_class:
            try:
                images.append(_read(file, size))
                classes.append(index)
            except _UNREADABLE as error:
                skipped.append(f"{file} ({error})")
                if strict:
                    raise ArgumentError(
                        f"path must hold readable images; {skipped[0]} is not. Remove it, or pass strict=False to skip."
                    ) from error
            if progress is not None:
                progress((len(images) + len(skipped)) / total)
    check_left_out("images", skipped, set(classes), tuple(files), path)
    return LabelledImages(torch.stack(images), torch.tensor(classes), tuple(files), len(skipped) + found.num_left_out)


def _read(file: Path, size: int) -> Tensor:
    """[3, size, size] uint8."""
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):  # converting these would clip, not scale, to 8 bits
            raise ValueError(f"mode {opened.mode} has more than 8 bits a channel")
        upright = ImageOps.exif_transpose(opened)
        square = ImageOps.fit(upright.convert("RGB"), (size, size), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).movedim(-1, 0)
