"""The input in another order: tokens of text, patches of images."""

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Inputs, Subject


def token_order(length: int, draws: torch.Generator) -> Tensor:
    """The tokens between the first and the last in another order, [N]."""
    order = torch.arange(length)
    order[1:-1] = 1 + torch.randperm(length - 2, generator=draws)
    return order


def grid_of(subject: Subject, inputs: Inputs) -> tuple[int, int]:
    """Patches along the height and the width of images."""
    height, width = inputs["pixel_values"].shape[-2:]
    return height // patch_size(subject), width // patch_size(subject)


def patch_size(subject: Subject) -> int:
    """Pixels along a patch's side."""
    size = subject.config.patch_size
    return int(size if isinstance(size, int) else size[0])


def window_side(subject: Subject, grid: tuple[int, int]) -> int | None:
    """Patches along a side of the windows that the first layer looks inside; None where it sees the whole image."""
    side = getattr(subject.config, "window_size", None)
    return None if side is None else min(int(side), *grid)


def in_each_window(inside: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """An order of the places inside a window, [side * side], as one of all patches, [N]; what fills no window stays."""
    rows, columns = grid
    places = torch.arange(rows * columns).view(rows, columns)
    order = places.clone()
    for top in range(0, rows - side + 1, side):
        for left in range(0, columns - side + 1, side):
            window = (slice(top, top + side), slice(left, left + side))
            order[window] = places[window].flatten()[inside].view(side, side)
    return order.flatten()


def with_patches(subject: Subject, inputs: Inputs, order: Tensor) -> Inputs:
    """Images whose patches stand in another order, row by row."""
    pixels, size = inputs["pixel_values"], patch_size(subject)
    rows, columns = grid_of(subject, inputs)
    whole = pixels[..., : rows * size, : columns * size]
    patches = nn.functional.unfold(whole.float(), size, stride=size)[..., order]
    moved = nn.functional.fold(patches, whole.shape[-2:], size, stride=size)
    return {"pixel_values": moved.to(pixels.dtype)}
