"""xPos: a rotary embedding whose scores decay with distance."""

import math

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple_of, require_positive
from transformer_problems.core.errors import SequenceTooLongError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.position.rotary import inverse_frequencies, turn

_GAMMA = 0.4


class XPos(PositionEncoding):
    """RotaryEmbedding that also shrinks pair i of the query by zeta_i^(n/b) and of the key by zeta_i^(-m/b).

    Their product is zeta_i^((n-m)/b): it decays with the distance n - m, faster for fast-turning pairs, and is for
    causal attention, since scores of later keys would grow. b is `scale_base`.

    A cached key carries its factor for good, so the origin of n and m can be any constant but never the current
    length. `centre` is that constant; scores do not depend on it, but each factor does and must stay a float: the
    reach of float32 is 23.6 * scale_base to either side of it (12,000 positions for 512), that of float16 eight
    times less. Positions beyond the reach are refused rather than clipped. For the longest reach set the
    centre to the middle of the positions that will be used.

    Args:
        head_dim: D, even.
        scale_base: b; the larger, the slower the decay.
        centre: Position whose factor is 1.
        base: Longest wavelength over 2 pi of the rotation.

    Shape:
        q: [..., H, N, D]; k: [..., G, M, D]; positions: [..., N] and [..., M]; output: as q and k.

    Raises:
        SequenceTooLongError: If a position is beyond the reach of the input's dtype.

    Source:
        Sun et al. 2022, arXiv:2212.10554, section 3. Differs from the paper: positions are centred on a
        constant, not on the middle of the current sequence; blockwise causal attention is an attention
        op's affair; features are paired by halves, as in RotaryEmbedding.
    """

    attends = True
    keeps_norms = False

    def __init__(
        self, head_dim: int, *, scale_base: float = 512.0, centre: float = 0.0, base: float = 10_000.0
    ) -> None:
        super().__init__()
        require_multiple_of("head_dim", head_dim, 2, "a pair of features")
        require_positive(scale_base=scale_base, base=base)
        self.head_dim, self.scale_base, self.centre, self.base = head_dim, scale_base, centre, base

    def rotate(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        inverse_frequency = inverse_frequencies(self.head_dim, self.base, q.device)
        q, k = turn(q, k, q_positions, k_positions, inverse_frequency)
        return q * self._scale(q_positions, q.dtype), k / self._scale(k_positions, k.dtype)

    def reach(self, dtype: torch.dtype) -> float:
        """Positions to either side of the centre whose factors use at most a third of the dtype's exponents.

        The query's factor, the key's and their features each have a third, so no score overflows.
        """
        halvings = math.log2((1 + _GAMMA) / _GAMMA)  # of the pair that decays fastest, in scale_base positions
        return math.log2(torch.finfo(dtype).max) / 3 * self.scale_base / halvings

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, scale_base={self.scale_base:g}, centre={self.centre:g}, base={self.base:g}"

    def _scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """zeta_i^((p - centre) / scale_base) for both halves of the features, [..., 1, N, D]."""
        self._check(positions, dtype)
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float32, device=positions.device)
        zeta = (2 * pairs / self.head_dim + _GAMMA) / (1 + _GAMMA)
        power = (positions[..., None] - self.centre).float() / self.scale_base
        return torch.cat([zeta**power] * 2, dim=-1).unsqueeze(-3).to(dtype)

    def _check(self, positions: Tensor, dtype: torch.dtype) -> None:
        reach = self.reach(min(dtype, torch.float32, key=lambda d: torch.finfo(d).max))
        if positions.numel() and float((positions - self.centre).abs().max()) > reach:
            raise SequenceTooLongError(
                f"positions must lie within {reach:.0f} of centre={self.centre:g} in {dtype}; got up to "
                f"{int(positions.max())}. Raise scale_base, move centre to the middle of the positions, or use a "
                "wider dtype."
            )
