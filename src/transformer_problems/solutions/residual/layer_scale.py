"""LayerScale: pre-norm, with a small learned factor on each channel of what a sublayer brings."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive, require_positive_int
from transformer_problems.core.slots import NormFactory


class LayerScale(nn.Module):
    """x + gamma * sublayer(norm(x)) with a learned gamma per channel that starts small.

    The untrained stack is close to the identity, so tokens stay distinct and deep stacks train; each channel then
    opens as far as it is of use. The weights of a sublayer learn gamma times more slowly at first.

    Args:
        embed_dim: C.
        initial: What gamma starts at. The paper takes 0.1 for up to 18 layers, 1e-5 for 24 and 1e-6 for more.
        norm: Makes the norm, e.g. nn.LayerNorm, nn.RMSNorm.

    Shape:
        x: [..., C]; output: [..., C].

    Raises:
        ArgumentError: If the width or the initial value is not positive.

    Source:
        Touvron et al. 2021, arXiv:2103.17239, section 2 and figure 1.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        initial: float = 0.1,
        norm: NormFactory = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim)
        require_positive(initial=initial)
        self.norm = norm(embed_dim, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial, device=device, dtype=dtype))

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.gamma * sublayer(self.norm(x))
