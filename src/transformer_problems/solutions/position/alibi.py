"""Attention with linear biases (ALiBi): the farther a key, the lower its score."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.slots import PositionEncoding


class ALiBi(PositionEncoding):
    """Adds -slope_h * |i - j| to the score of query i and key j; nothing is learned.

    Slopes fall geometrically from head to head, 2^(-8h/H) for H a power of two, so that some heads look near and
    some far. Costs O(H * N * M). Extrapolates by looking away from distant keys, which also means not recalling them.

    Args:
        num_heads: H.

    Shape:
        q: [..., H, N, D]; positions: [..., N] and [..., M]; bias: [..., H, N, M].

    Source:
        Press et al. 2022, arXiv:2108.12409, section 3; slopes of other head counts as in the authors' code.
        Differs from the paper: later keys, which only encoders see, are penalised like earlier ones.
    """

    attends = True
    biases = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        require_positive_int(num_heads=num_heads)
        self.num_heads = num_heads

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        slopes = torch.tensor(alibi_slopes(self.num_heads), device=q.device)
        distance = (q_positions[..., :, None] - k_positions[..., None, :]).abs().unsqueeze(-3)  # [..., 1, N, M]
        return (-slopes[:, None, None] * distance).to(q.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head: those of the next lower power of two, then every second one of the next higher."""
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / whole) for h in range(1, whole + 1)]
    between = [2.0 ** (-4 * h / whole) for h in range(1, 2 * whole, 2)]
    return slopes + between[: num_heads - whole]
