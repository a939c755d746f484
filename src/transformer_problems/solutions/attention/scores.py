"""What attention ops share: masks, head matching, and a softmax that survives empty rows."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.errors import ArgumentError


def match_heads(q: Tensor, kv: Tensor) -> Tensor:
    """Repeat key/value heads [..., G, M, D] so that there is one for each query head [..., H, N, D]."""
    num_heads, num_kv_heads = q.shape[-3], kv.shape[-3]
    if num_heads == num_kv_heads:
        return kv
    require_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
    return kv.repeat_interleave(num_heads // num_kv_heads, dim=-3)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[N, M] bool: the queries are the last N of the M tokens, each sees itself and what came before."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def key_mask_of(mask: Tensor, op_name: str) -> Tensor:
    """The key mask [..., M] inside a mask [..., 1, 1, M], for ops that never form N x M scores.

    Raises:
        ArgumentError: If the mask differs between queries or heads.
    """
    if mask.dim() < 2 or mask.shape[-2] != 1 or (mask.dim() > 2 and mask.shape[-3] != 1):
        raise ArgumentError(
            f"mask must be a key mask of shape [..., 1, 1, M] for {op_name}, which never forms N x M scores; "
            f"got {tuple(mask.shape)}. Use DenseAttention for arbitrary masks."
        )
    return mask.squeeze(-2).squeeze(-2) if mask.dim() > 2 else mask.squeeze(-2)


def masked_softmax(scores: Tensor, allowed: Tensor | None, *, empty_rows: bool = True) -> Tensor:
    """Softmax over the last dimension in float32 or wider, zero where `allowed` is False. Overwrites `scores`.

    A row without a single allowed key gives zeros instead of NaN. Where the caller knows that there is none,
    `empty_rows=False` saves the passes over the scores that this takes.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if allowed is None:
        return scores.softmax(dim=-1)
    empty = ~allowed.any(dim=-1, keepdim=True) if empty_rows else None
    with torch.no_grad():  # a weight of zero passes no gradient back, so the fills need no backward pass of their own
        scores.masked_fill_(~allowed, float("-inf"))
        if empty is not None:
            scores.masked_fill_(empty, 0.0)
    weights = scores.softmax(dim=-1)
    return weights if empty is None else weights.masked_fill(empty, 0.0)
