"""Rotary position embedding (RoPE), the encoding of most current language models."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple_of, require_positive
from transformer_problems.core.slots import PositionEncoding


class RotaryEmbedding(PositionEncoding):
    """Turns pairs of query and key features by an angle proportional to position.

    Feature i is paired with feature i + D/2 and turned by p * base^(-2i/D), so a score depends on the distance
    of query and key only. Costs O(N * D); angles are computed in float32 whatever the input's dtype.

    Args:
        head_dim: D, even.
        base: Longest wavelength over 2 pi, 10,000 in the paper.

    Shape:
        q: [..., H, N, D]; k: [..., G, M, D]; positions: [..., N] and [..., M]; output: as q and k.

    Source:
        Su et al. 2021, arXiv:2104.09864, section 3.2.2. Differs from the paper: features are paired by halves,
        not as neighbours (the layout of Llama's checkpoints; a fixed permutation of the features).
    """

    attends = True

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        require_multiple_of("head_dim", head_dim, 2, "a pair of features")
        require_positive(base=base)
        self.head_dim, self.base = head_dim, base
        self._on_cpu = inverse_frequencies(head_dim, base, torch.device("cpu"))  # not a buffer, which .to() would round

    def rotate(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        is_cpu = q.device.type == "cpu"
        inverse_frequency = self._on_cpu if is_cpu else inverse_frequencies(self.head_dim, self.base, q.device)
        return turn(q, k, q_positions, k_positions, inverse_frequency)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}"


def inverse_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i/D) for i = 0 ... D/2 - 1, [D/2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return base**-exponents


def turn(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    inverse_frequency: Tensor,
    *,
    magnitude: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """q [..., H, N, D] and k [..., G, M, D] with each half-pair turned by positions times its frequency."""
    turning = _turning(q_positions, inverse_frequency, magnitude, q.dtype)
    shared = k_positions is q_positions and k.dtype == q.dtype  # as in every layer whose keys are its own tokens'
    k_turning = turning if shared else _turning(k_positions, inverse_frequency, magnitude, k.dtype)
    return _turned(q, *turning), _turned(k, *k_turning)


def _turning(
    positions: Tensor, inverse_frequency: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [..., N], each [..., 1, N, D/2]."""
    angles = (positions[..., None].to(inverse_frequency.dtype) * inverse_frequency).unsqueeze(-3)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
