"""ReZero: each sublayer starts switched off, behind one learned factor."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int


class ReZero(nn.Module):
    """x + alpha * sublayer(x) with a learned scalar alpha, 0 at the start: the untrained stack is the identity.

    Signals and gradients pass a stack of any depth unchanged at first, without a norm. The first step teaches only the
    alphas, since nothing reaches the sublayers' weights before they are open.

    Args:
        embed_dim: C.

    Shape:
        x: [..., C]; output: [..., C].

    Raises:
        ArgumentError: If the width is not positive.

    Source:
        Bachlechner et al. 2020, arXiv:2003.04887, equation 1.
        Differs from the paper: the attention and the feed-forward network of a layer have an alpha each, where the
        paper's share one.
    """

    def __init__(
        self, embed_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.alpha * sublayer(x)
