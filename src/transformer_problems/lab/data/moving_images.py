"""Clips made of real images that move over each other, as moving digits are in the literature.

Synthetic by design, after Moving MNIST (Srivastava et al. 2015, arXiv:1502.04681): the motion is made up, the images
are real. How fast they move is asked, for that no single frame can tell: at every moment an image is anywhere in the
frame with equal chances, whatever its speed.
"""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.digits import Images

SPEEDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of an image's side, in a frame: the classes
_IMAGES = 2  # in a clip


@dataclass(frozen=True, slots=True, eq=False)
class Clips:
    """Clips [B, 1, T, H, W], float32 from 0 to 1, and classes [B]."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


def moving_digits(digits: Images, num_clips: int, *, num_frames: int, size: int, generator: torch.Generator) -> Clips:
    """Two images a clip, both equally fast and each on a straight way of its own; the class is their speed.

    They start anywhere, in any direction, and bounce from the borders of the frame, which they never leave. Where they
    overlap, their pixels add up to at most 1. Places are rounded to whole pixels, so that images stay as they are.

    Args:
        digits: Square images to choose from, smaller than the frame: those for training, or those for test.
        num_clips: B.
        num_frames: T, at least 2.
        size: Height and width of the frame, in pixels.
        generator: Draws images, speeds, places and directions; on the CPU.

    Raises:
        ArgumentError: If a number is not positive, one frame is asked for, images have no room to move, or are not
            square or not of floating point.
    """
    require_positive_int(num_clips=num_clips, num_frames=num_frames, size=size)
    side = digits.pixels.shape[-1]
    if digits.pixels.shape[-2] != side or not digits.pixels.is_floating_point():
        raise ArgumentError(
            f"digits must be square images of floating point from 0 to 1; got {digits.pixels.dtype} "
            f"{list(digits.pixels.shape)}. Crop them, and divide bytes by 255."
        )
    if num_frames == 1:
        raise ArgumentError("num_frames must be 2 or more, for a speed to be seen; got 1. Choose e.g. 8.")
    if size <= side:
        raise ArgumentError(
            f"size must leave images of {side} pixels a side room to move; got {size}. Choose {side + 1} or more."
        )
    classes = torch.randint(len(SPEEDS), (num_clips,), generator=generator)
    speed = side * torch.tensor(SPEEDS)[classes]
    pixels = torch.zeros(num_clips, num_frames, size, size)
    for _ in range(_IMAGES):
        chosen = torch.randint(len(digits), (num_clips,), generator=generator)
        _draw(pixels, digits.pixels[chosen, 0], _ways(speed, num_frames, size - side, generator))
    return Clips(pixels.clamp(max=1)[:, None], classes)


def _ways(speed: Tensor, num_frames: int, room: int, generator: torch.Generator) -> Tensor:
    """Where an upper left corner is in each frame, [B] pixels a frame -> [B, T, 2] whole pixels from 0 to `room`."""
    start = room * torch.rand(len(speed), 1, 2, generator=generator)
    angle = 2 * pi * torch.rand(len(speed), 1, generator=generator)
    velocity = speed[:, None, None] * torch.stack([angle.sin(), angle.cos()], dim=-1)
    straight = start + velocity * torch.arange(num_frames)[:, None]
    folded = straight.remainder(2 * room)  # there and back again is a straight way of twice the room
    return torch.minimum(folded, 2 * room - folded).round().long()


def _draw(frames: Tensor, images: Tensor, corners: Tensor) -> None:
    """Adds an image to each clip's frames, in place. frames: [B, T, H, W]; images: [B, h, h]; corners: [B, T, 2]."""
    span = torch.arange(images.shape[-1])
    rows, columns = (corners[..., axis, None] + span for axis in (0, 1))  # [B, T, h]
    clip, step = (torch.arange(n) for n in frames.shape[:2])
    frames[clip[:, None, None, None], step[:, None, None], rows[..., None], columns[..., None, :]] += images[:, None]
