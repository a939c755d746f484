"""The score matrix tile by tile, and a softmax that takes its tiles one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from transformer_problems.core.slots import PositionBias


@dataclass(frozen=True, slots=True)
class ScoreTiles:
    """The score matrix, never whole: its tiles and how each is formed.

    Args:
        q: [..., H, N, D].
        k: [..., H, M, D].
        dense: A bias that is whole, broadcastable to [..., H, N, M].
        lazy: A bias that is asked tile by tile.
        mask: True may attend, broadcastable to [..., H, N, M].
        is_causal: The queries are the last N of the M tokens, each sees itself and what came before.
        num_rows: Queries in a tile.
        num_columns: Keys in a tile.
    """

    q: Tensor
    k: Tensor
    dense: Tensor | None
    lazy: PositionBias | None
    mask: Tensor | None
    is_causal: bool
    num_rows: int
    num_columns: int

    @property
    def offset(self) -> int:
        """Query i sees keys up to i + offset."""
        return self.k.shape[-2] - self.q.shape[-2]

    def rows(self) -> Iterator[slice]:
        yield from _slices(self.q.shape[-2], self.num_rows)

    def columns(self, rows: slice) -> Iterator[slice]:
        """Key tiles of a query tile, without those above the diagonal."""
        num_keys = self.k.shape[-2]
        yield from _slices(min(num_keys, rows.stop + self.offset) if self.is_causal else num_keys, self.num_columns)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[..., H, rows, columns] in float32 or wider, -inf where a query may not attend."""
        q = wide(self.q[..., rows, :]) * self.q.shape[-1] ** -0.5
        scores: Tensor = q @ wide(self.k[..., columns, :]).mT
        if self.dense is not None:
            scores = scores + part_of(self.dense, rows, columns)
        if self.lazy is not None:
            scores = scores + self.lazy.tile(rows, columns)
        if self.mask is not None:
            scores = masked(scores, part_of(self.mask, rows, columns))
        if self.is_causal and columns.stop - 1 > rows.start + self.offset:
            row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            column = torch.arange(columns.start, columns.stop, device=q.device)
            scores = masked(scores, column <= row + self.offset)
        return scores


class RunningSoftmax(NamedTuple):
    """softmax(scores) v of a query tile over the key tiles so far, corrected as larger scores appear.

    Args:
        largest: Largest score of each row, [..., H, n, 1]; only a reference, so it passes no gradient.
        total: Sum of exp(score - largest), [..., H, n, 1].
        sums: Sum of exp(score - largest) * value, [..., H, n, D].
    """

    largest: Tensor
    total: Tensor
    sums: Tensor

    @classmethod
    def of_no_key(cls, scores: ScoreTiles, v: Tensor, rows: slice) -> Self:
        shape = scores.q[..., rows, :].shape[:-1]
        largest = wide(scores.q).new_full((*shape, 1), float("-inf"))
        return cls(largest, torch.zeros_like(largest), largest.new_zeros(*shape, v.shape[-1]))

    def with_tile(self, tile: Tensor, v: Tensor) -> Self:
        """With more keys. tile: [..., H, n, m]; v: [..., H, m, D]."""
        largest = torch.maximum(self.largest, tile.detach().amax(dim=-1, keepdim=True))
        reference = largest.masked_fill(largest == float("-inf"), 0.0)
        weights, shrink = (tile - reference).exp(), (self.largest - reference).exp()
        total = self.total * shrink + weights.sum(dim=-1, keepdim=True)
        return type(self)(largest, total, self.sums * shrink + weights @ wide(v))

    def output(self) -> Tensor:
        """Zeros for rows without a key."""
        return self.sums / self.total.masked_fill(self.total == 0.0, 1.0)

    def log_sum(self) -> Tensor:
        """log sum exp(score) of each row; +inf without a key, so that exp(score - log_sum) is zero."""
        return (self.largest + self.total.log()).masked_fill(self.total == 0.0, float("inf"))


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with -inf where the mask is False."""
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def part_of(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """A rectangle of a tensor that may have one row or one column for all. x: [..., N or 1, M or 1]."""
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., rows, :]
    return x if x.shape[-1] == 1 else x[..., columns]


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))
