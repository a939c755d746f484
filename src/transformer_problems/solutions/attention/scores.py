"""What attention ops share: shape checks, masks, head matching, and a softmax that survives empty rows."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import shown


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Refuse what an op would cut to size without a word, or a kernel read past its end.

    Asked for every token in decoding, so it only compares sizes. The values may be wider than the keys.

    Raises:
        ArgumentError: If q, k or v has fewer than three dimensions or holds no floats, q and k differ in width or have
            none, k and v differ in number, or the mask does not fit the scores.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point():
            raise ArgumentError(f"{name} must be floats [..., H, N, D]; got {shown(x)}. Give one head as {name}[None].")
    num_keys, head_dim = k.shape[-2:]
    if head_dim == 0:
        raise ArgumentError(f"q and k must have a last dimension, D, of one at least; got 0, in {list(k.shape)}.")
    if q.shape[-1] != head_dim:
        raise ArgumentError(
            f"q and k must have the same last dimension, D; got {q.shape[-1]} and {head_dim}, in {list(q.shape)} and "
            f"{list(k.shape)}. Project both to one head_dim."
        )
    if q.shape[:-3] != k.shape[:-3]:
        raise ArgumentError(
            f"q and k must be of the same sequences; got {list(q.shape)} and {list(k.shape)}. Repeat keys and values "
            "for each sequence of queries."
        )
    if v.shape[-2] != num_keys:
        raise ArgumentError(
            f"v must have one value for each of the {num_keys} keys; got {v.shape[-2]}, in {list(v.shape)}. "
            "Pass k and v of the same tokens."
        )
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], num_keys))


def _check_mask(mask: Tensor, scores: tuple[int, ...]) -> None:
    fits = mask.dim() <= len(scores) and all(
        own in (1, needed) for own, needed in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise ArgumentError(
            f"mask must be bool, True may attend, and broadcastable to the scores {list(scores)}; got {mask.dtype} "
            f"{list(mask.shape)}. Pass a key mask as mask[:, None, None, :]."
        )


def without_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The empty output of N = 0 queries, [..., H, 0, D], which passes zeros back to k and v."""
    return q @ match_heads(q, k).mT @ match_heads(q, v)


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
