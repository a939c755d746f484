"""What the models of this room tell apart: the built-in images and voices, or the user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.digits import SIZE, load_digit_images
from transformer_problems.lab.data.idx_files import load_idx
from transformer_problems.lab.data.image_folder import load_image_folder
from transformer_problems.lab.data.labelled import LabelledImages
from transformer_problems.lab.data.speech import NUM_FEATURES, NUM_SPEAKERS, load_japanese_vowels
from transformer_problems.lab.data.wav_folder import load_wav_folder
from transformer_problems.lab.experiment import OwnData

SPEECH = frozenset({"encoder", "conformer"})
"""The arms that hear; the others see."""

_OWN_SIDE = 32  # pixels that the user's own images are scaled to
_HELD_OUT = 0.2  # of data that comes without a split


@dataclass(frozen=True, slots=True)
class Form:
    """What examples look like: channels (or features a frame), pixels a side (0 for sounds), and classes."""

    channels: int
    side: int
    num_classes: int


DIGITS = Form(1, SIZE, 10)
SPEAKERS = Form(NUM_FEATURES, 0, NUM_SPEAKERS)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs of a model, each [n, ...], and their classes [n]."""

    inputs: tuple[Tensor, ...]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, chosen: Tensor, device: torch.device) -> Self:
        """The chosen ones; images of bytes become numbers from 0 to 1."""
        inputs = tuple(part[chosen].to(device) for part in self.inputs)
        return type(self)(
            tuple(part / 255 if part.dtype == torch.uint8 else part for part in inputs), self.classes[chosen].to(device)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Examples to learn from and to be tested on, their form, and how many files could not be read."""

    known: Examples
    tested: Examples
    form: Form
    num_skipped: int = 0


def built_in_task(arm: str) -> Task:
    """scikit-learn's digits; or utterances of nine speakers, their coefficients and which frames are real."""
    if arm not in SPEECH:
        images, asked = load_digit_images()
        return Task(Examples((images.pixels,), images.classes), Examples((asked.pixels,), asked.classes), DIGITS)
    known, tested = (load_japanese_vowels(split) for split in ("TRAIN", "TEST"))
    return Task(
        Examples((known.features, known.key_mask), known.classes),
        Examples((tested.features, tested.key_mask), tested.classes),
        SPEAKERS,
    )


def kind_of(data: Path) -> Literal["idx", "images", "sounds"]:
    """What a folder holds, told by the first file that is known.

    Raises:
        ArgumentError: If there is none.
    """
    suffixes = {".png": "images", ".jpg": "images", ".jpeg": "images", ".wav": "sounds"}
    for file in sorted(data.rglob("*")):
        if "-idx" in file.name:
            return "idx"
        if (kind := suffixes.get(file.suffix.lower())) is not None and not file.name.startswith("."):
            return kind  # type: ignore[return-value]
    raise ArgumentError(
        f"data must hold a sub-folder of .png, .jpg or .wav files for each class, or the idx files of MNIST; {data} "
        "holds none."
    )


def own_task(own: OwnData, progress: Callable[[float], None]) -> Task:
    """The user's own images or recordings; a fifth of those without a split is held out for the test.

    Raises:
        ArgumentError: If the data cannot be read (any of it, where it says strict), or is of one class.
    """
    data = own.folder
    kind = kind_of(data)
    if kind == "idx":
        train, test = (load_idx(data, split=split, progress=progress) for split in ("train", "test"))
        return Task(_images(train), _images(test), _form(train.pixels.shape[1], _OWN_SIDE, train.class_names, data))
    if kind == "images":
        images = load_image_folder(data, size=_OWN_SIDE, strict=own.strict, progress=progress)
        whole, form = _images(images), _form(3, _OWN_SIDE, images.class_names, data)
        num_skipped = images.num_skipped
    else:
        sounds = load_wav_folder(data, strict=own.strict, progress=progress)
        whole = Examples((sounds.features, sounds.key_mask), sounds.classes)
        form = _form(sounds.features.shape[2], 0, sounds.class_names, data)
        num_skipped = sounds.num_skipped
    order = torch.randperm(len(whole), generator=generator(0, "own data"))
    num_tested = max(1, round(_HELD_OUT * len(whole)))
    cpu = torch.device("cpu")
    return Task(_part(whole, order[num_tested:], cpu), _part(whole, order[:num_tested], cpu), form, num_skipped)


def _images(images: LabelledImages) -> Examples:
    """As bytes, [n, channels, 32, 32]."""
    pixels = images.pixels
    if pixels.shape[-2:] != (_OWN_SIDE, _OWN_SIDE):
        parts = (interpolate(part.float(), size=(_OWN_SIDE, _OWN_SIDE), mode="bilinear") for part in pixels.split(1000))
        pixels = torch.cat([part.round().to(torch.uint8) for part in parts])
    return Examples((pixels,), images.classes)


def _part(whole: Examples, chosen: Tensor, device: torch.device) -> Examples:
    return Examples(tuple(part[chosen].to(device) for part in whole.inputs), whole.classes[chosen].to(device))


def _form(channels: int, side: int, class_names: tuple[str, ...], data: Path) -> Form:
    if len(class_names) < 2:
        raise ArgumentError(f"data must hold two classes at least; {data} holds {len(class_names)}. Add another.")
    return Form(channels, side, len(class_names))
