"""FlashAttention: exact softmax attention without the N x M matrix in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import causal_mask, match_heads

Backend = Literal["auto", "sdpa", "tiled"]


class FlashAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v computed tile by tile, in memory that grows as N + M.

    Keys are taken in tiles with a softmax that is corrected as larger scores appear; only the output and each row's
    log-sum-exp are kept, and the backward pass computes the tiles again. The arithmetic still grows as N * M; causal
    attention leaves out the tiles above the diagonal.

    Memory is linear for attention without a mask, with key masks and, in "tiled", with a bias that needs no gradient.
    A bias that needs one is formed whole. "sdpa" holds an N x M mask for every bias, for a causal mask beside a key
    mask, and for causal attention of 1 < N < M.

    Args:
        backend: "sdpa" is PyTorch's scaled_dot_product_attention, which picks its fastest kernel; "tiled" is the
            algorithm written out, on any device; "auto" is "sdpa".
        block_size: Queries and keys in one tile of "tiled".

    Attributes:
        runs: The back end that answers every call, "sdpa" or "tiled".

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        UnknownNameError: If there is no such back end.
        ArgumentError: If `block_size` is not positive or H is not a multiple of G.

    Source:
        Dao et al. 2022, arXiv:2205.14135, algorithms 1, 2 and 4. Differs from the paper: queries are the outer loop
        (as in Dao 2023, arXiv:2307.08691), tiles are square and sized for caches, not for a GPU's shared memory, and
        there is no dropout.
    """

    def __init__(self, *, backend: Backend = "auto", block_size: int = 128) -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise UnknownNameError("backend", backend, get_args(Backend))
        require_positive(block_size=block_size)
        self.runs: Literal["sdpa", "tiled"] = "tiled" if backend == "tiled" else "sdpa"
        self.block_size = block_size

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
        k, v = match_heads(q, k), match_heads(q, v)
        if self.runs == "sdpa":
            return _sdpa(q, k, v, bias, mask, is_causal)
        dense = bias.dense() if bias is not None and _needs_gradient(bias) else None
        lazy = bias if dense is None else None
        out: Tensor = _Tiled.apply(q, k, v, dense, lazy, mask, is_causal, self.block_size)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return f"runs={self.runs!r}, block_size={self.block_size}"


def _needs_gradient(bias: PositionBias) -> bool:
    """Whether anything the bias is made of is being trained; asked of its first score alone."""
    first = slice(0, 1)
    return bias.tile(first, first).requires_grad


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None, is_causal: bool) -> Tensor:
    """PyTorch's kernel, which wants four dimensions, one mask without empty rows, and N = M where it is causal."""
    lead, num_queries, num_keys = q.shape[:-3], q.shape[-2], k.shape[-2]
    native_causal = is_causal and bias is None and mask is None and num_queries == num_keys
    if is_causal and not native_causal and num_queries > 1:  # one query is the last token and sees every key
        causal = causal_mask(num_queries, num_keys, q.device)
        mask = causal if mask is None else mask & causal
    empty = None
    if mask is not None:
        empty = ~mask.any(dim=-1, keepdim=True)
        mask = mask | empty
    attn_mask = mask if bias is None else _masked(bias.dense().to(q.dtype), mask)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    y = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if attn_mask is None else _flattened(attn_mask, lead),
        is_causal=native_causal,
    )
    y = y.reshape(*lead, *y.shape[-3:])
    return y if empty is None else y.masked_fill(empty, 0.0)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _flattened(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask or bias broadcastable to [*lead, H, N, M] with `lead` as one dimension."""
    rank = len(lead) + 3
    mask = mask[(None,) * (rank - mask.dim())]
    return mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


@dataclass(frozen=True, slots=True)
class _Scores:
    """The score matrix, never whole: its tiles and how each is formed."""

    q: Tensor
    k: Tensor
    dense: Tensor | None
    lazy: PositionBias | None
    mask: Tensor | None
    is_causal: bool
    block_size: int

    @property
    def offset(self) -> int:
        """Query i sees keys up to i + offset."""
        return self.k.shape[-2] - self.q.shape[-2]

    def rows(self) -> Iterator[slice]:
        yield from _blocks(self.q.shape[-2], self.block_size)

    def columns(self, rows: slice) -> Iterator[slice]:
        """Key tiles of a query tile, without those above the diagonal."""
        num_keys = self.k.shape[-2]
        yield from _blocks(min(num_keys, rows.stop + self.offset) if self.is_causal else num_keys, self.block_size)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[..., H, rows, columns] in float32 or wider, -inf where a query may not attend."""
        q = _wide(self.q[..., rows, :]) * self.q.shape[-1] ** -0.5
        scores: Tensor = q @ _wide(self.k[..., columns, :]).mT
        if self.dense is not None:
            scores = scores + _part(self.dense, rows, columns)
        if self.lazy is not None:
            scores = scores + self.lazy.tile(rows, columns)
        if self.mask is not None:
            scores = _masked(scores, _part(self.mask, rows, columns))
        if self.is_causal and columns.stop - 1 > rows.start + self.offset:
            row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            column = torch.arange(columns.start, columns.stop, device=q.device)
            scores = _masked(scores, column <= row + self.offset)
        return scores


class _Tiled(torch.autograd.Function):
    """Algorithms 1 and 4 of the paper; saves its inputs, the output and the log-sum-exp of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor | None,
        lazy: PositionBias | None,
        mask: Tensor | None,
        is_causal: bool,
        block_size: int,
    ) -> Tensor:
        scores = _Scores(q, k, dense, lazy, mask, is_causal, block_size)
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = _wide(q).new_empty(*q.shape[:-1], 1)
        for rows in scores.rows():
            out[..., rows, :], log_sums[..., rows, :] = _online_softmax(scores, v, rows)
        ctx.save_for_backward(q, k, v, dense, mask, out, log_sums)
        ctx.lazy, ctx.is_causal, ctx.block_size = lazy, is_causal, block_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, dense, mask, out, log_sums = ctx.saved_tensors
        scores = _Scores(q, k, dense, ctx.lazy, mask, ctx.is_causal, ctx.block_size)
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=log_sums.dtype) for x in (q, k, v))
        grad_bias = None if dense is None else torch.zeros_like(dense, dtype=log_sums.dtype)
        for rows in scores.rows():
            row_q, row_grad = _wide(q[..., rows, :]), _wide(grad_out[..., rows, :])
            mean_grad = (row_grad * out[..., rows, :]).sum(dim=-1, keepdim=True)
            for columns in scores.columns(rows):
                weights = (scores.tile(rows, columns) - log_sums[..., rows, :]).exp()
                grad_v[..., columns, :] += weights.mT @ row_grad
                grad_weights = row_grad @ _wide(v[..., columns, :]).mT
                grad_scores = weights * (grad_weights - mean_grad)
                grad_q[..., rows, :] += grad_scores @ _wide(k[..., columns, :]) * scale
                grad_k[..., columns, :] += grad_scores.mT @ row_q * scale
                if grad_bias is not None:
                    part = _part(grad_bias, rows, columns)
                    part += grad_scores.sum_to_size(part.shape)
        if grad_bias is not None:
            grad_bias = grad_bias.to(dense.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None, None, None


def _online_softmax(scores: _Scores, v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one query tile; zeros and +inf for rows without a key, so that exp(-lse) is zero."""
    shape = scores.q[..., rows, :].shape[:-1]
    largest = _wide(scores.q).new_full((*shape, 1), float("-inf"))
    total = torch.zeros_like(largest)
    sums = largest.new_zeros(*shape, v.shape[-1])
    for columns in scores.columns(rows):
        tile = scores.tile(rows, columns)
        new_largest = torch.maximum(largest, tile.amax(dim=-1, keepdim=True))
        reference = new_largest.masked_fill(new_largest == float("-inf"), 0.0)
        weights, shrink = (tile - reference).exp(), (largest - reference).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        sums = sums * shrink + weights @ _wide(v[..., columns, :])
        largest = new_largest
    empty = total == 0.0
    return sums / total.masked_fill(empty, 1.0), (largest + total.log()).masked_fill(empty, float("inf"))


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))


def _part(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """A rectangle of a tensor that may have one row or one column for all. x: [..., N or 1, M or 1]."""
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., rows, :]
    return x if x.shape[-1] == 1 else x[..., columns]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
