"""How the tokens of a grid fall into windows, and the moves into them and back."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GridWindows:
    """How the N tokens of a grid fall into W windows of T slots each, S = W * T in all.

    Args:
        tokens: The token in each slot, [S]; any where there is none.
        slots: The slot of each token, [N].
        blank: Slots without a token, [S, 1]; None where there are none.
        mask: 0 where a slot may see another of its window, else -inf, [W, 1, T, T]; None where all may.
        offsets: Where the bias of each pair of slots stands in the table, [T, T].
    """

    tokens: Tensor
    slots: Tensor
    blank: Tensor | None
    mask: Tensor | None
    offsets: Tensor

    @classmethod
    def of(
        cls, grid: tuple[int, ...], window_size: tuple[int, ...], *, shifted: bool, device: torch.device
    ) -> "GridWindows":
        """The windows of such a grid: made once, and shared by all layers."""
        # What a compiler traces are no tensors to keep.
        make = _make if torch.compiler.is_compiling() else _kept
        return make(grid, window_size, shifted, device)

    @property
    def length(self) -> int:
        return len(self.offsets)

    @property
    def num_windows(self) -> int:
        return len(self.tokens) // self.length

    def cut(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, S, C], zeros in blank slots."""
        y: Tensor = _Move.apply(x, self, True)  # type: ignore[no-untyped-call]
        return y

    def join(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, N, C], what is in blank slots left out."""
        y: Tensor = _Move.apply(x, self, False)  # type: ignore[no-untyped-call]
        return y


class _Move(torch.autograd.Function):
    """Into windows or out of them. Each is the other's gradient, which PyTorch would find by a serial scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: GridWindows, inwards: bool) -> Tensor:
        ctx.windows, ctx.inwards = windows, inwards
        if not inwards:
            return x[:, windows.slots]
        y = x[:, windows.tokens]
        return y if windows.blank is None else y.masked_fill_(windows.blank, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Move.apply(grad, ctx.windows, not ctx.inwards), None, None  # type: ignore[no-untyped-call]


def _make(grid: tuple[int, ...], window_size: tuple[int, ...], shifted: bool, device: torch.device) -> GridWindows:
    sizes = tuple(min(size, length) for size, length in zip(window_size, grid, strict=True))
    shifts = tuple(size // 2 if shifted and size < length else 0 for size, length in zip(sizes, grid, strict=True))
    num_tokens, has_blanks = prod(grid), any(length % size for size, length in zip(sizes, grid, strict=True))
    with torch.inference_mode(False):
        tokens, regions, blank = torch.tensor(0), torch.tensor(0), torch.tensor(False)
        for length, size, shift in zip(grid, sizes, shifts, strict=True):
            slots = torch.arange(-(-length // size) * size)
            places = (slots + shift) % len(slots)  # the cyclic shift
            beyond = places >= length
            tokens = tokens[..., None] * length + places
            regions = regions[..., None] * 3 + (places < shift) + 2 * beyond
            blank = blank[..., None] | beyond
        tokens, regions, blank = (_by_window(x, sizes) for x in (tokens, regions, blank))  # [W, T]
        tokens = tokens.masked_fill(blank, num_tokens).flatten()
        mask = None
        if has_blanks or any(shifts):
            mask = torch.where(regions[:, :, None] == regions[:, None], 0.0, float("-inf"))[:, None].to(device)
        return GridWindows(
            tokens=tokens.clamp(max=num_tokens - 1).to(device),
            slots=tokens.argsort()[:num_tokens].to(device),
            blank=blank.flatten()[:, None].to(device) if has_blanks else None,
            mask=mask,
            offsets=_offsets(sizes, window_size).to(device),
        )


_kept = lru_cache(maxsize=64)(_make)


def _by_window(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[slots of axis 1, slots of axis 2, ...] -> [W, T], windows and their slots row by row."""
    axes = len(sizes)
    for axis in reversed(range(axes)):
        x = x.unflatten(axis, (-1, sizes[axis]))
    return x.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).flatten(axes).flatten(0, axes - 1)


def _offsets(sizes: tuple[int, ...], window_size: tuple[int, ...]) -> Tensor:
    """Place in the table of each query's offset from each key, [T, T]; a window that shrank has the nearer ones."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij")).flatten(1)  # [axes, T]
    index = torch.tensor(0)
    for place, size in zip(places, window_size, strict=True):
        index = index * (2 * size - 1) + place[:, None] - place + size - 1
    return index
