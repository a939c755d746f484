"""T5's relative position bias: one learned number a head for each bucket of distances."""

import math

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple_of, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionEncoding


class T5RelativeBias(PositionEncoding):
    """Adds b[head, bucket(i - j)] to the score of query i and key j.

    Half of the buckets hold one distance each, the other half grow logarithmically up to `max_distance`, and the
    last one holds everything farther, so any length can be read. Costs O(H * N * M).

    Args:
        num_heads: H.
        num_buckets: Buckets in all; without causality half of them are for later keys.
        max_distance: Distance from which on all keys look equally far.
        is_causal: Later keys are never attended to and need no buckets.

    Shape:
        q: [..., H, N, D]; positions: [..., N] and [..., M] int; bias: [..., H, N, M].

    Raises:
        ArgumentError: If the buckets or the distance are too few.

    Source:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1; bucket limits as in the authors' code. Differs from the
        paper: scores are scaled by 1 / sqrt(D), which T5 folds into its initialisation, and every layer has
        biases of its own unless one module is given to all of them.
    """

    attends = True
    biases = True

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        is_causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_heads=num_heads, max_distance=max_distance)
        require_multiple_of("num_buckets", num_buckets, 2 if is_causal else 4, "for they are split in halves")
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.is_causal = max_distance, is_causal
        if max_distance <= self._num_exact:
            raise ArgumentError(
                f"max_distance must exceed the {self._num_exact} distances with a bucket of their own; "
                f"got {max_distance}. Raise max_distance or lower num_buckets."
            )
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = q_positions[..., :, None] - k_positions[..., None, :]  # [..., N, M]
        return nn.functional.embedding(self._bucket(distance), self.weight).movedim(-1, -3)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"is_causal={self.is_causal}"
        )

    @property
    def _num_exact(self) -> int:
        """Distances of one side with a bucket of their own."""
        return self.num_buckets // (2 if self.is_causal else 4)

    def _bucket(self, distance: Tensor) -> Tensor:
        if self.is_causal:
            return self._one_sided_bucket(distance.clamp(min=0))
        later = (distance < 0) * (self.num_buckets // 2)
        return later + self._one_sided_bucket(distance.abs())

    def _one_sided_bucket(self, distance: Tensor) -> Tensor:
        exact, last = self._num_exact, 2 * self._num_exact - 1
        octaves = (distance.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        far = exact + (octaves * (last + 1 - exact)).to(distance.dtype)
        return torch.where(distance < exact, distance, far.clamp(max=last))
