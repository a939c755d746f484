"""Memory-efficient attention: exact softmax attention in chunks, from ordinary tensor operations alone."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.score_tiles import RunningSoftmax, ScoreTiles
from transformer_problems.solutions.attention.scores import check_shapes, has_pairs, match_heads, without_pairs

Inputs = TypeVarTuple("Inputs")
T = TypeVar("T")


class MemoryEfficientAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v, a chunk of queries against a chunk of keys at a time.

    A running maximum and sum join the chunks; autograd differentiates them. Every chunk of queries is a checkpoint,
    and every chunk of keys within it, so the forward pass keeps the inputs and the output only, and the backward pass
    works on one chunk of queries at a time: O(query_chunk * (key_chunk + D * M / key_chunk)) beside what is linear in
    N + M, least at key_chunk = sqrt(D * M). Also a bias that is trained is formed chunk by chunk. The arithmetic still
    grows as N * M, and each score is computed three times in training: once forward, and once for each of the two
    levels of checkpoints. Causal attention leaves out the chunks above the diagonal.

    Args:
        query_chunk: Queries in a chunk.
        key_chunk: Keys in a chunk.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If a chunk is not positive, or q, k, v and mask do not fit each other.

    Source:
        Rabe and Staats 2021, arXiv:2112.05682, sections 2 to 4. Differs from the paper: the chunks of keys follow one
        another with a running maximum, where the paper computes them apart and joins them at the end; chunks of
        queries are checkpoints too, without which what is kept would still grow as N * M / key_chunk.
    """

    def __init__(self, query_chunk: int = 128, key_chunk: int = 512) -> None:
        super().__init__()
        require_positive_int(query_chunk=query_chunk, key_chunk=key_chunk)
        self.query_chunk, self.key_chunk = query_chunk, key_chunk

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        check_shapes(q, k, v, mask, bias)
        if not has_pairs(q, k):
            return without_pairs(q, k, v)
        k, v = match_heads(q, k), match_heads(q, v)
        tiles = _Tiles(bias, mask, is_causal, self.query_chunk, self.key_chunk)
        return torch.cat([_recomputed(_attend, tiles, q, k, v, rows) for rows in tiles.of(q, k).rows()], dim=-2)

    def extra_repr(self) -> str:
        return f"query_chunk={self.query_chunk}, key_chunk={self.key_chunk}"


class _Tiles(NamedTuple):
    """How scores are formed, without the queries and keys.

    Inside another checkpoint only an argument that is itself a tensor is let go and computed again; all that other
    arguments hold stays in memory. So queries, keys, values and running sums travel beside this, one by one.
    """

    bias: PositionBias | None
    mask: Tensor | None
    is_causal: bool
    query_chunk: int
    key_chunk: int

    def of(self, q: Tensor, k: Tensor) -> ScoreTiles:
        return ScoreTiles(q, k, None, *self)


def _attend(tiles: _Tiles, q: Tensor, k: Tensor, v: Tensor, rows: slice) -> Tensor:
    """The output of one chunk of queries, [..., H, rows, D]."""
    scores = tiles.of(q, k)
    softmax = RunningSoftmax.of_no_key(scores, v, rows)
    for columns in scores.columns(rows):
        softmax = _recomputed(_with_chunk, tiles, q, k, v, rows, columns, *softmax)
    return softmax.output().to(v.dtype)


def _with_chunk(
    tiles: _Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice,
    columns: slice,
    largest: Tensor,
    total: Tensor,
    sums: Tensor,
) -> RunningSoftmax:
    softmax = RunningSoftmax(largest, total, sums)
    return softmax.with_tile(tiles.of(q, k).tile(rows, columns), v[..., columns, :])


def _recomputed(function: Callable[[*Inputs], T], *args: *Inputs) -> T:
    """The function's result; what it would save for the backward pass is computed again there."""
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
