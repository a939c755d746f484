"""How a pass grows with its input: inputs of chosen sizes, and the arithmetic of a pass as a function of the length."""

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Inputs, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.lab.meters.flops import count_flops

_STEP = 16  # tokens, or patches
_TOLERANCE = 0.01  # a pooler that reads one token, or a rounded window, is no other law


@dataclass(frozen=True, slots=True)
class Growth:
    """constant + linear N + square N^2 + local N min(N, window) of an input of N tokens, or patches of an image.

    Args:
        local: Of layers that look at no more than `window` keys.
    """

    constant: float
    linear: float
    square: float
    local: float = 0.0
    window: float = math.inf

    def at(self, length: float) -> float:
        """What N = length costs."""
        return self.constant + self.linear * length + self.scores(length)

    def scores(self, length: float) -> float:
        """The part between two tokens each, which grows with the square, but for what windows hide."""
        return self.square * length**2 + self.local * length * min(length, self.window)

    def square_share(self, length: float) -> float:
        """That part's share."""
        return self.scores(length) / self.at(length)

    def half_length(self) -> float:
        """From this length on that part is half of it and more; infinite where it never is."""
        inside = _root(self.square + self.local, self.linear, self.constant)
        if inside <= self.window:
            return inside
        return _root(self.square, self.linear - self.local * self.window, self.constant)


def _root(square: float, linear: float, constant: float) -> float:
    """The N from which square N^2 exceeds linear N + constant."""
    if square > 0:
        return (linear + math.sqrt(linear**2 + 4 * square * constant)) / (2 * square)
    return constant / -linear if linear < 0 else math.inf


def through(lengths: tuple[int, int, int], costs: tuple[float, float, float]) -> Growth:
    """The one law of this form through three points."""
    (x, y, z), (fx, fy, fz) = lengths, costs
    first, second = (fy - fx) / (y - x), (fz - fy) / (z - y)
    square = (second - first) / (z - x)
    linear = first - square * (x + y)
    return Growth(fx - linear * x - square * x**2, linear, square)


def longest_input(subject: Subject) -> int:
    """Tokens of the longest input that the model was made for; patches of its images.

    Raises:
        CombinationError: If neither config nor tokenizer tells.
    """
    if subject.kind == "image":
        height, width = _image_size(subject)
        return (height // _patch_side(subject)) * (width // _patch_side(subject))
    if subject.trained_len is None:
        raise CombinationError(
            f"neither the config nor the tokenizer of {subject.name} tells how long its inputs are. Add "
            "max_position_embeddings to its config."
        )
    return subject.trained_len


def unit_of(subject: Subject) -> str:
    """What an input is counted in."""
    return "patches" if subject.kind == "image" else "tokens"


def sized(visit: Visit, multiple: int) -> tuple[int, Inputs]:
    """An input of `multiple` steps, and how many tokens or patches that are: 16 of them a step.

    Windows have to fit into the smallest map of a Swin, so a step of its is a whole image.
    """
    subject = visit.subject
    if subject.kind != "image":
        step = min(_STEP, longest_input(subject) // 4)
        return step * multiple, visit.texts(1, step * multiple)
    patch = _patch_side(subject)
    height, width = _image_size(subject) if _has_windows(subject) else (4 * patch, 4 * patch)
    pixels = nn.functional.interpolate(visit.images(1)["pixel_values"].float(), (height, width * multiple))
    return (height // patch) * (width * multiple // patch), image_of_any_size(subject, pixels.to(subject.dtype))


def image_of_any_size(subject: Subject, pixels: Tensor) -> Inputs:
    """What makes the model take an image of another size than its own; pixels: [B, 3, height, width]."""
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if "interpolate_pos_encoding" in inspect.signature(subject.model.forward).parameters:
        inputs["interpolate_pos_encoding"] = True
    return cast("Inputs", inputs)


@torch.no_grad()
def arithmetic_by_length(visit: Visit) -> Growth:
    """FLOPs of one pass by the length of its input, counted at three short lengths and checked at a fourth.

    Layers with windows are counted as passes compute them, whole and masked, and told as what they need.

    Raises:
        CombinationError: If another law governs them.
    """
    counted = [_counted(visit, multiple) for multiple in (1, 2, 3)]
    (x, fx), (y, fy), (z, fz) = counted
    growth = through((x, y, z), (fx, fy, fz))
    if not _has_windows(visit.subject):  # a fourth image would take as long as the first three
        length, flops = _counted(visit, 4)
        if abs(growth.at(length) - flops) > _TOLERANCE * flops:
            raise CombinationError(
                f"the arithmetic of {visit.subject.name} does not follow its length: {flops:,} FLOPs at {length} "
                f"{unit_of(visit.subject)}, where {growth.at(length):,.0f} were expected."
            )
    subject = visit.subject
    if (window := subject.narrowest) is None:
        return growth
    local = growth.square * sum(each is not None for each in subject.windows) / len(subject.windows)
    return Growth(growth.constant, growth.linear, growth.square - local, local, window)


def _counted(visit: Visit, multiple: int) -> tuple[int, int]:
    length, inputs = sized(visit, multiple)
    return length, count_flops(partial(visit.subject.run, inputs))


def _has_windows(subject: Subject) -> bool:
    return subject.kind == "image" and getattr(subject.config, "window_size", None) is not None


def _image_size(subject: Subject) -> tuple[int, int]:
    size = subject.config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _patch_side(subject: Subject) -> int:
    side = subject.config.patch_size
    return int(side[0] if isinstance(side, list | tuple) else side)
