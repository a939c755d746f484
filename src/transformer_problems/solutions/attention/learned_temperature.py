"""Learned temperature: each head learns how sharp its softmax is."""

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


class LearnedTemperature(WrappedOp):
    """softmax(q k^T / (tau_h sqrt(D))) v with a learned temperature tau for each head, in any op.

    Below 1 attention is sharper than usual and averages over fewer tokens. The queries are divided, before the op: so
    are those that a position bias reads (Shaw, Transformer-XL), while what does not depend on the query is added as it
    is (ALiBi, T5, Transformer-XL's v). Costs H parameters.

    Args:
        num_heads: H.
        op: The op inside. Default DenseAttention.
        initial: Where every temperature starts.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: what the op inside takes; output: [..., H, N, D].

    Raises:
        ArgumentError: If num_heads or the temperature is not positive, or q has other heads.
        CombinationError: If the op inside is built for another number of heads.

    Source:
        Lee et al. 2021, arXiv:2112.13492, the learnable temperature of its locality self-attention.
        Differs from the paper: a token still sees itself, which there is masked; the temperature comes on top of
        sqrt(D), where there it replaces it and starts at it; its logarithm is learned, so that it stays positive.
    """

    def __init__(
        self,
        num_heads: int,
        op: AttentionOp | None = None,
        *,
        initial: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(DenseAttention() if op is None else op, num_heads=num_heads)
        require_positive(initial=initial)
        self.log_temperature = nn.Parameter(torch.full((num_heads,), math.log(initial), device=device, dtype=dtype))

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
        q, bias = change_queries(self._divided, q, bias)
        return self.op(q, k, v, bias=bias, mask=mask, is_causal=is_causal)

    def stream(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next n tokens, where the op inside streams itself, q: [B, H, n, D] -> [B, H, n, D]."""
        return self._streaming_op.stream(self._divided(q), k, v, state)

    def temperature(self) -> Tensor:
        """tau of each head, [H] in float32 or wider."""
        wide = torch.promote_types(self.log_temperature.dtype, torch.float32)
        return self.log_temperature.to(wide).exp()

    def _divided(self, q: Tensor) -> Tensor:
        check_num_heads(q, self.num_heads)
        return (q / self.temperature()[:, None, None]).to(q.dtype)
