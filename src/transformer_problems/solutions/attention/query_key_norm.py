"""Query-key normalisation: scores are cosines times a learned scale, so they cannot grow without bound."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.slots import AttentionOp, PositionBias
from transformer_problems.core.wrapped_op import WrappedOp
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.queries import change_queries, check_num_heads
from transformer_problems.solutions.attention.scores import check_shapes

_SMALLEST_NORM = 1e-6  # below it a vector has no direction to speak of, and its gradient would be divided by nothing


class QueryKeyNorm(WrappedOp):
    """softmax(g_h cos(q, k)) v with a learned scale g for each head, in any op: no score exceeds |g_h|.

    Queries and keys become unit vectors, in float32 or wider, so that how sharp attention is hangs on g alone, and no
    growth of the weights can saturate it. Queries that a position bias reads (Shaw) are treated alike; a bias is added
    to the bounded score as it is. The norm comes after the rotation, so an encoding that changes norms there is
    refused (xPos, YaRN, Transformer-XL). A cache holds keys as they were, so each step of decoding normalises all of
    them. Costs H parameters.

    Args:
        num_heads: H.
        op: The op inside. Default DenseAttention.
        initial_scale: Where every g starts. The paper takes log2(L^2 - L) for sequences of L tokens: 10 for 32, 12 for
            64, 18 for 512.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: what the op inside takes; output: [..., H, N, D].

    Raises:
        ArgumentError: If num_heads or the scale is not positive, or q has other heads.
        CombinationError: If the op inside is built for another number of heads.

    Source:
        Henry et al. 2020, arXiv:2010.04245.
        Differs from the paper: each head has its own scale, where there the heads of a layer share one; vectors
        shorter than 1e-6 are divided by that.
    """

    def __init__(
        self,
        num_heads: int,
        op: AttentionOp | None = None,
        *,
        initial_scale: float = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(DenseAttention() if op is None else op, num_heads=num_heads)
        require_positive(initial_scale=initial_scale)
        self.ignores_norms = True
        self.scale = nn.Parameter(torch.full((num_heads,), initial_scale, device=device, dtype=dtype))

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
        q, bias = change_queries(self._scaled, q, bias)
        return self.op(q, _unit(k).to(k.dtype), v, bias=bias, mask=mask, is_causal=is_causal)

    def stream(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next n tokens, where the op inside streams itself, q: [B, H, n, D] -> [B, H, n, D]."""
        return self._streaming_op.stream(self._scaled(q), _unit(k).to(k.dtype), v, state)

    def _scaled(self, q: Tensor) -> Tensor:
        """Unit queries times g sqrt(D), of which the op inside takes sqrt(D) away."""
        check_num_heads(q, self.num_heads)
        return (_unit(q) * (self.scale[:, None, None] * math.sqrt(q.shape[-1]))).to(q.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1, eps=_SMALLEST_NORM)
