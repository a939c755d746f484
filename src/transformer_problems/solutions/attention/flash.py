"""FlashAttention: exact softmax attention without the N x M matrix in memory."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.score_tiles import RunningSoftmax, ScoreTiles, masked, part_of, wide
from transformer_problems.solutions.attention.scores import causal_mask, check_shapes, match_heads

Backend = Literal["auto", "sdpa", "tiled"]
_WIDENED_SCORES = 2**14  # scores of single queries for which a float32 copy of keys and values is small and pays


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
        ArgumentError: If `block_size` is not positive, or q, k, v and mask do not fit each other.

    Source:
        Dao et al. 2022, arXiv:2205.14135, algorithms 1, 2 and 4. Differs from the paper: queries are the outer loop
        (as in Dao 2023, arXiv:2307.08691), tiles are square and sized for caches, not for a GPU's shared memory, and
        there is no dropout.
    """

    def __init__(self, *, backend: Backend = "auto", block_size: int = 128) -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise UnknownNameError("backend", backend, get_args(Backend))
        require_positive_int(block_size=block_size)
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
        check_shapes(q, k, v, mask)
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
    native_causal = is_causal and bias is None and mask is None and bool(num_queries == num_keys)  # bool: for exports
    if is_causal and not native_causal and num_queries > 1:  # one query is the last token and sees every key
        causal = causal_mask(num_queries, num_keys, q.device)
        mask = causal if mask is None else mask & causal
    empty = None
    if mask is not None:
        empty = ~mask.any(dim=-1, keepdim=True)
        mask = mask | empty
    attn_mask = mask if bias is None else masked(bias.dense().to(q.dtype), mask)
    q, k, v = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (q, k, v))  # -1 fails without queries
    attn_mask = None if attn_mask is None else _flattened(attn_mask, lead)
    dtype = v.dtype
    if _better_widened(q, k):
        q, k, v = q.float(), k.float(), v.float()
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=native_causal).to(dtype)
    y = y.reshape(*lead, *y.shape[-3:])
    return y if empty is None else y.masked_fill(empty, 0.0)


def _better_widened(q: Tensor, k: Tensor) -> bool:
    """Whether float32 copies are faster: PyTorch's CPU kernel takes a single query in half precision 2 to 3x slower."""
    is_half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    return is_half and q.shape[-2] == 1 and q.shape[:-1].numel() * k.shape[-2] <= _WIDENED_SCORES


def _flattened(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask or bias broadcastable to [*lead, H, N, M] with `lead` as one dimension."""
    rank = len(lead) + 3
    mask = mask[(None,) * (rank - mask.dim())]
    return mask.expand(*lead, *mask.shape[-3:]).reshape(math.prod(lead), *mask.shape[-3:])


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
        scores = ScoreTiles(q, k, dense, lazy, mask, is_causal, block_size, block_size)
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = wide(q).new_empty(*q.shape[:-1], 1)
        for rows in scores.rows():
            softmax = RunningSoftmax.of_no_key(scores, v, rows)
            for columns in scores.columns(rows):
                softmax = softmax.with_tile(scores.tile(rows, columns), v[..., columns, :])
            out[..., rows, :], log_sums[..., rows, :] = softmax.output(), softmax.log_sum()
        ctx.save_for_backward(q, k, v, dense, mask, out, log_sums)
        ctx.lazy, ctx.is_causal, ctx.block_size = lazy, is_causal, block_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, dense, mask, out, log_sums = ctx.saved_tensors
        scores = ScoreTiles(q, k, dense, ctx.lazy, mask, ctx.is_causal, ctx.block_size, ctx.block_size)
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=log_sums.dtype) for x in (q, k, v))
        grad_bias = None if dense is None else torch.zeros_like(dense, dtype=log_sums.dtype)
        for rows in scores.rows():
            row_q, row_grad = wide(q[..., rows, :]), wide(grad_out[..., rows, :])
            mean_grad = (row_grad * out[..., rows, :]).sum(dim=-1, keepdim=True)
            for columns in scores.columns(rows):
                weights = (scores.tile(rows, columns) - log_sums[..., rows, :]).exp()
                grad_v[..., columns, :] += weights.mT @ row_grad
                grad_weights = row_grad @ wide(v[..., columns, :]).mT
                grad_scores = weights * (grad_weights - mean_grad)
                grad_q[..., rows, :] += grad_scores @ wide(k[..., columns, :]) * scale
                grad_k[..., columns, :] += grad_scores.mT @ row_q * scale
                if grad_bias is not None:
                    part = part_of(grad_bias, rows, columns)
                    part += grad_scores.sum_to_size(part.shape)
        if grad_bias is not None:
            grad_bias = grad_bias.to(dense.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None, None, None
