"""What the problem is shown on: layers that replace their input in place of adding to it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import NormFactory
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention


class NoSkip(nn.Module):
    """sublayer(norm(x)): the pre-norm layer without its skip.

    Args:
        embed_dim: C.
        norm: Makes the norm, e.g. nn.LayerNorm, nn.RMSNorm.

    Shape:
        x: [..., C]; output: [..., C].
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
        return sublayer(self.norm(x))


def attention_only(embed_dim: int, num_heads: int, num_layers: int) -> nn.ModuleList:
    """Attention layers to run one after the other, in float64, with Xavier's initial weights.

    Queries are doubled: sharper attention collapses a little later, so that more than two layers show how.
    Weights are drawn from PyTorch's global generator.
    """
    layers = nn.ModuleList(
        SelfAttention(embed_dim, num_heads, op=DenseAttention(), is_causal=False, dtype=torch.float64)
        for _ in range(num_layers)
    )
    for name, weight in layers.named_parameters():
        nn.init.xavier_normal_(weight, gain=2.0 if "q_proj" in name else 1.0)
    return layers
