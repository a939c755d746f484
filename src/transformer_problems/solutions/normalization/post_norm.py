"""Post-LayerNorm: the norm stands behind the skip, as in the first Transformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import NormFactory


class PostNorm(nn.Module):
    """norm(x + sublayer(x)): every sublayer's output has the same size, and the skip passes through each norm.

    At the start the last layer's gradient is as large at any depth, where a pre-norm stack's falls as 1/sqrt(L), and
    each norm shrinks what passes down to earlier layers by up to sqrt(2): large learning rates diverge or stall without
    warmup. A well-tuned post-norm model can end better than a pre-norm one.

    Args:
        embed_dim: C.
        norm: Makes the norm, e.g. nn.LayerNorm, nn.RMSNorm.

    Shape:
        x: [..., C]; output: [..., C].

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.1; its gradients: Xiong et al. 2020, arXiv:2002.04745.
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
        y: Tensor = self.norm(x + sublayer(x))
        return y
