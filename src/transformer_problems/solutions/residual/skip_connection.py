"""The skip connection: a sublayer adds to its input instead of replacing it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SkipConnection(nn.Module):
    """x + sublayer(x): the identity is always there, and the sublayer learns what to change.

    Attention alone averages the tokens, so a stack of it makes them all alike; along the skip each keeps its own
    content. Nothing limits the size of x: with no norm it grows by a factor in each layer, so deep stacks overflow.

    Args:
        embed_dim: C. Any will do, and there are no parameters: it is taken, as are `device` and `dtype`, because
            every residual is built alike.

    Shape:
        x: [..., C]; output: [..., C].

    Source:
        He et al. 2015, arXiv:1512.03385, equation 1.
        Differs from the paper: no nonlinearity follows the sum.
    """

    def __init__(
        self, embed_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + sublayer(x)
