"""Plain softmax attention, the baseline that every other op is compared with."""

from torch import Tensor, nn

from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import causal_mask, check_shapes, masked_softmax, match_heads


class DenseAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v with all N x M scores held in memory.

    Time and memory grow as N * M. The scores are formed in the input's dtype and normalised in float32.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If q, k, v and mask do not fit each other.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """

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
        k, v = match_heads(q, k), match_heads(q, v)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [..., H, N, M]
        if bias is not None:
            scores = scores + bias.dense()
        # A causal query sees at least itself; a mask may leave it nothing, and so may fewer keys than queries.
        empty_rows = mask is not None or q.shape[-2] > k.shape[-2]
        if is_causal:
            causal = causal_mask(q.shape[-2], k.shape[-2], q.device)
            mask = causal if mask is None else mask & causal
        return masked_softmax(scores, mask, empty_rows=empty_rows).to(v.dtype) @ v
