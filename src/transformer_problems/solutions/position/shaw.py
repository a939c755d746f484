"""Learned vectors for clipped distances, the first relative position encoding."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.slots import PositionEncoding


class ShawRelative(PositionEncoding):
    """Adds q_i . a_{clip(j - i, -k, k)} / sqrt(D) to the score of query i and key j; a is learned.

    All distances beyond k = `max_distance` share a vector, so any length can be read. The 2k + 1 products of each
    query are formed once and gathered, O(N * (k * D + M)), instead of materialising a for every pair.

    Args:
        head_dim: D.
        max_distance: k, the distance from which on all keys of one side look equally far.

    Shape:
        q: [..., H, N, D]; positions: [..., N] and [..., M] int; bias: [..., H, N, M].

    Source:
        Shaw et al. 2018, arXiv:1803.02155, equations 4 and 5; one table for all heads, as there. Differs from the
        paper: the term on the values (equation 3) is left out; the ablation of section 4.3 (table 3) finds that
        translation is as good without it.
    """

    attends = True
    biases = True

    def __init__(
        self,
        head_dim: int,
        *,
        max_distance: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(head_dim=head_dim, max_distance=max_distance)
        self.head_dim, self.max_distance = head_dim, max_distance
        self.weight = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.weight)

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        products = (q * q.shape[-1] ** -0.5) @ self.weight.T  # [..., H, N, 2k+1]
        distance = k_positions[..., None, :] - q_positions[..., :, None]  # [..., N, M]
        index = (distance.clamp(-self.max_distance, self.max_distance) + self.max_distance).unsqueeze(-3)
        index = index[(None,) * (products.dim() - index.dim())]  # take_along_dim broadcasts sizes, not ranks
        bias: Tensor = products.take_along_dim(index, dim=-1)
        return bias

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, max_distance={self.max_distance}"
