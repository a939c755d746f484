"""What the models of this room tell apart: the built-in images and voices, or the user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.choice import hold_out
from transformer_problems.lab.data.class_folders import files_by_class
from transformer_problems.lab.data.digits import SIZE, load_digit_images
from transformer_problems.lab.data.idx_files import load_idx
from transformer_problems.lab.data.image_folder import IMAGE_SUFFIXES, load_image_folder
from transformer_problems.lab.data.labelled import LabelledImages
from transformer_problems.lab.data.speech import NUM_FEATURES, NUM_SPEAKERS, load_japanese_vowels
from transformer_problems.lab.data.wav_folder import SOUND_SUFFIXES, load_wav_folder
from transformer_problems.lab.experiment import OwnData

SPEECH = frozenset({"encoder", "conformer"})
"""The arms that hear; the others see."""

Kind = Literal["idx", "images", "sounds"]
_SUFFIXES: dict[Kind, tuple[str, ...]] = {"images": IMAGE_SUFFIXES, "sounds": SOUND_SUFFIXES}
_OWN_SIDE = 32  # pixels that the user's own images are scaled to
OWN_SECONDS = 5.0  # of a recording: attention to 10 would take 7 GB to learn from a batch
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

    def select(self, chosen: Tensor, device: torch.device | None = None) -> Self:
        """The chosen ones, on a device; default where they are."""
        return type(self)(tuple(part[chosen].to(device) for part in self.inputs), self.classes[chosen].to(device))

    def numbers(self) -> tuple[Tensor, ...]:
        """The inputs as models take them: images of bytes become numbers from 0 to 1."""
        return tuple(part / 255 if part.dtype == torch.uint8 else part for part in self.inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Examples to learn from and to be tested on, their form, and how many files were left out, or cut."""

    known: Examples
    tested: Examples
    form: Form
    num_skipped: int = 0
    num_cut: int = 0


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


def kind_of(data: Path) -> Kind:
    """What a folder holds, told by the first file that is known.

    Raises:
        ArgumentError: If there is none.
    """
    for file in sorted(data.rglob("*")):
        if "-idx" in file.name:
            return "idx"
        for kind, suffixes in _SUFFIXES.items():
            if file.suffix.lower() in suffixes and not file.name.startswith("."):
                return kind
    raise ArgumentError(
        f"data must hold a sub-folder of .png, .jpg or .wav files for each class, or the idx files of MNIST; {data} "
        "holds none."
    )


def listed_kind(own: OwnData) -> Kind:
    """What a folder holds, after a look at the names of its files; what will be left out of it, a warning counts.

    Raises:
        ArgumentError: If there are too few files to learn from and to test with, or, where it says strict, any would
            be left out.
    """
    kind = kind_of(own.folder)
    if kind != "idx":
        files = files_by_class(own.folder, _SUFFIXES[kind], strict=own.strict).by_class
        _check_enough({name: len(of_class) for name, of_class in files.items()}, own.folder)
    return kind


def own_task(own: OwnData, progress: Callable[[float], None]) -> Task:
    """The user's own images or recordings; a fifth of each class of those without a split is held out for the test.

    Raises:
        ArgumentError: If the data cannot be read (any of it, where it says strict), or there is too little of it.
    """
    data = own.folder
    kind = kind_of(data)
    if kind == "idx":
        train, test = (load_idx(data, split=split, progress=progress) for split in ("train", "test"))
        form = _form(train.pixels.shape[1], _OWN_SIDE, train.class_names, data)
        return Task(_images(train), _images(test), form)
    num_cut = 0
    if kind == "images":
        images = load_image_folder(data, size=_OWN_SIDE, strict=own.strict, progress=progress)
        whole, form = _images(images), _form(3, _OWN_SIDE, images.class_names, data)
        names, num_skipped = images.class_names, images.num_skipped
    else:
        sounds = load_wav_folder(data, max_seconds=OWN_SECONDS, strict=own.strict, progress=progress)
        whole = Examples((sounds.features, sounds.key_mask), sounds.classes)
        form = _form(sounds.features.shape[2], 0, sounds.class_names, data)
        names, num_skipped, num_cut = sounds.class_names, sounds.num_skipped, sounds.num_cut
    counts = whole.classes.bincount(minlength=len(names)).tolist()
    _check_enough(dict(zip(names, counts, strict=True)), data)
    known, tested = hold_out(whole.classes, _HELD_OUT, generator(0, "own data"))
    return Task(whole.select(known), whole.select(tested), form, num_skipped, num_cut)


def _images(images: LabelledImages) -> Examples:
    """As bytes, [n, channels, 32, 32]."""
    pixels = images.pixels
    if pixels.shape[-2:] != (_OWN_SIDE, _OWN_SIDE):
        parts = (interpolate(part.float(), size=(_OWN_SIDE, _OWN_SIDE), mode="bilinear") for part in pixels.split(1000))
        pixels = torch.cat([part.round().to(torch.uint8) for part in parts])
    return Examples((pixels,), images.classes)


def _form(channels: int, side: int, class_names: tuple[str, ...], data: Path) -> Form:
    if len(class_names) < 2:
        raise ArgumentError(f"data must hold two classes at least; {data} holds {len(class_names)}. Add another.")
    return Form(channels, side, len(class_names))


def _check_enough(counts: Mapping[str, int], data: Path) -> None:
    """Refuse a class of too few examples, by the number of each."""
    for name, num in counts.items():
        if num < 2:
            raise ArgumentError(
                f"every class must have 2 readable files at least, one to learn from and one for the test; "
                f"{data / name} has {num}. Add {2 - num} or remove the class."
            )
