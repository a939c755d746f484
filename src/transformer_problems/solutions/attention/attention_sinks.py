"""Attention sinks: a sliding window that never lets go of the first tokens."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import check_shapes, key_mask_of
from transformer_problems.solutions.attention.sliding_window import window_attention


class AttentionSinks(nn.Module):
    """Softmax attention over the `window_size` nearest keys on each side (causal: the left side) and the first keys.

    Trained models park attention that they have no use for on the first tokens; a plain window drops those and
    the softmax has nowhere left to go. Time and memory grow as N * (window_size + num_sinks). A stream keeps the
    sinks and the window, `SelfAttention` reading `num_sinks` and `lookback`, so its state stops growing: of the
    keys given, the first `num_sinks` are the sinks, and the others must be consecutive tokens.

    Args:
        window_size: Keys visible to each query on each side, not counting its own.
        num_sinks: First keys visible to every query, `is_causal` permitting.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D], N <= M; mask: [..., 1, 1, M]; output: [..., H, N, D].
        The queries are the last N of the M tokens, causal or not.

    Raises:
        ArgumentError: If a size is not positive, there are more queries than keys, the mask is not a key mask, or
            q, k, v and mask do not fit each other.

    Source:
        Xiao et al. 2023, arXiv:2309.17453, section 3.2.
        Differs from the paper: tokens keep their positions in the text; the paper numbers them by their places in
        the cache, which keeps distances to the sinks within those trained on.
    """

    def __init__(self, window_size: int, *, num_sinks: int = 4) -> None:
        super().__init__()
        require_positive_int(window_size=window_size, num_sinks=num_sinks)
        self.window_size, self.num_sinks = window_size, num_sinks
        self.lookback = window_size

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
        return window_attention(
            q,
            k,
            v,
            self.window_size,
            always=torch.arange(min(self.num_sinks, k.shape[-2]), device=k.device),
            bias=bias,
            key_mask=None if mask is None else key_mask_of(mask, "AttentionSinks"),
            is_causal=is_causal,
        )

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_sinks={self.num_sinks}"
