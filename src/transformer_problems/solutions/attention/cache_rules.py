"""Rules that the key/value caches share."""

from typing import TypeVar

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_same_batch

Held = TypeVar("Held")


def check_appended(k: Tensor, v: Tensor, batch_size: int, stored: Tensor | None) -> None:
    """Refuse keys and values that a cache cannot hold side by side with what it stores.

    Args:
        batch_size: Sequences that the cache follows.
        stored: Keys of the heads, width, dtype and device that it stores; None where any will do.

    Shape:
        k, v: [B, G, n, D]; stored: [..., G, ..., D], of four dimensions.

    Raises:
        ArgumentError: If k and v differ in shape, follow other sequences, or differ from what is stored.
    """
    if k.dim() != 4 or v.shape != k.shape:
        raise ArgumentError(
            f"k and v must both be [B, G, n, D]; got {list(k.shape)} and {list(v.shape)}. "
            "Project them to the same number and width of heads."
        )
    check_same_batch(k, batch_size)
    kind = _kind(k if stored is None else stored)
    for name, x in (("k", k), ("v", v)):
        if _kind(x) != kind:
            num_heads, head_dim, dtype, device = kind
            raise ArgumentError(
                f"{name} must be [{batch_size}, {num_heads}, n, {head_dim}] {dtype} on {device}, as the cache is; got "
                f"{list(x.shape)} {x.dtype} on {x.device}. Make the cache, or its pool, as this layer is."
            )


def require_held(held: Held | None) -> Held:
    """What a cache holds, once anything was appended.

    Raises:
        ArgumentError: If nothing was, so that not even shapes are known.
    """
    if held is None:
        raise ArgumentError("an empty cache has no keys, values or positions yet, for it knows no shape. Append first.")
    return held


def _kind(x: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return x.shape[1], x.shape[3], x.dtype, x.device
