"""What attention ops share: shape checks, masks, head matching, and a softmax that survives empty rows."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import makes_alike, shown
from transformer_problems.core.slots import PositionBias


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: PositionBias | None) -> None:
    """Refuse what an op would cut to size without a word, or a kernel read past its end.

    Asked for every token in decoding, so it only compares sizes and kinds. The values may be wider than the keys.

    Raises:
        ArgumentError: If q, k or v has fewer than three dimensions or holds no floats, they differ in dtype or device,
            q and k differ in width or have none, k and v differ in number, the mask does not fit the scores, or the
            bias is none that an op can ask for parts.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point():
            raise ArgumentError(f"{name} must be floats [..., H, N, D]; got {shown(x)}. Give one head as {name}[None].")
    _check_kinds(q, k, v)
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
        _check_mask(mask, (*q.shape[:-1], num_keys), q.device)
    if bias is not None and not isinstance(bias, PositionBias):
        raise ArgumentError(
            f"bias must be a PositionBias, which an op asks for the parts it needs; got {shown(bias)}. Write a "
            "PositionEncoding whose `bias` gives these numbers."
        )


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One device, and one dtype that PyTorch computes in, unless autocast brings several to one."""
    if not q.dtype == k.dtype == v.dtype and not makes_alike(q.device, q.dtype, k.dtype, v.dtype):
        raise ArgumentError(
            f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}. Convert them, as in "
            "k.to(q.dtype), or compute under torch.autocast."
        )
    if not q.device == k.device == v.device:
        raise ArgumentError(
            f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}. Move them, as in "
            "k.to(q.device)."
        )
    if q.dtype.itemsize == 1:
        raise ArgumentError(
            f"q, k and v must be of 16 bits a number or more; got {q.dtype}. Make them wider first, as in "
            "q.to(torch.bfloat16)."
        )


def _check_mask(mask: Tensor, scores: tuple[int, ...], device: torch.device) -> None:
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool
    fits = (
        is_mask
        and mask.dim() <= len(scores)
        and all(own in (1, needed) for own, needed in zip(mask.shape[::-1], scores[::-1], strict=False))
    )
    if not fits:
        raise ArgumentError(
            f"mask must be bool, True may attend, and broadcastable to the scores {list(scores)}; got {shown(mask)}. "
            "Pass a key mask as mask[:, None, None, :]."
        )
    if mask.device != device:
        raise ArgumentError(f"mask must be on {device}, as q; got {mask.device}. Pass mask.to(q.device).")


def has_pairs(q: Tensor, k: Tensor) -> bool:
    """Whether any query could meet a key: whether there are sequences, heads, queries and keys at all."""
    return bool(q.numel()) and bool(k.numel())


def without_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output where no query meets a key, zeros [..., H, N, D] or empty, which passes zeros back to q, k and v."""
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
