"""The score matrix a few queries at a time, for ops that need whole rows of it but never all rows at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import match_heads


def query_blocks(
    q: Tensor,
    k: Tensor,
    *,
    bias: PositionBias | None,
    mask: Tensor | None,
    is_causal: bool,
    block_size: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scores of `block_size` queries after the other, and which of them are allowed (None: all).

    Under `is_causal` a block stops at the last key that one of its queries sees, so half of the work is left out.

    Shape:
        q: [..., H, N, D]; k: [..., G, M, D]; mask: broadcastable to [..., H, N, M].
        yields scores [..., H, n, m], m <= M keys from the first on, and bool broadcastable to them.
    """
    k = match_heads(q, k)
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    offset = num_keys - num_queries
    for start in range(0, max(1, num_queries), block_size):  # without queries one empty block
        rows = slice(start, min(start + block_size, num_queries))
        # one key at least, where more queries than keys leave a whole block nothing: it is not allowed either
        columns = slice(0, min(num_keys, max(1, rows.stop + offset)) if is_causal else num_keys)
        scores = (q[..., rows, :] * q.shape[-1] ** -0.5) @ k[..., columns, :].transpose(-2, -1)
        if bias is not None:
            scores = scores + bias.tile(rows, columns)
        allowed = None if mask is None else mask[..., rows if mask.shape[-2] > 1 else slice(None), columns]
        if is_causal:
            own = torch.arange(rows.start + offset, rows.stop + offset, device=q.device)
            causal = torch.arange(columns.stop, device=q.device) <= own[:, None]
            allowed = causal if allowed is None else allowed & causal
        yield scores, allowed
