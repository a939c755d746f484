"""Pre-LayerNorm: the norm stands at the entrance of each sublayer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import NormFactory


class PreNorm(nn.Module):
    """x + sublayer(norm(x)): the skip runs from the embeddings to the last layer untouched.

    The gradient reaches every layer along the skip, and that of the last layer falls as 1/sqrt(L) with the depth L, so
    training needs no warmup. The stream's variance grows with depth, so a stack of such layers ends in a norm of its
    own.

    Args:
        embed_dim: C.
        norm: Makes the norm, e.g. nn.LayerNorm, nn.RMSNorm.

    Shape:
        x: [..., C]; output: [..., C].

    Source:
        Xiong et al. 2020, arXiv:2002.04745, section 3 and figure 1b.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        norm: NormFactory = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + sublayer(self.norm(x))
