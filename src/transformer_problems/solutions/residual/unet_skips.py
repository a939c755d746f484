"""U-Net's long skips: late layers read the output of early ones again, the last that of the first."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError


class UNetSkips(nn.Module):
    """W [x; s] + b for each layer of the second half: x comes from the layer before, s from the mirrored layer.

    Layer i of L reads the output of layer L - 1 - i, as in a U-Net, so what the middle of the stack has washed out is
    there again. Of the two middle layers of an even stack the second has no skip: the first is the one before it.
    A join costs 2 C * C weights; early outputs stay in memory until they are read.

    Args:
        embed_dim: C.
        num_layers: L, 3 or more.

    Shape:
        history: i + 1 tensors [..., C], the embeddings first; output: [..., C].

    Raises:
        ArgumentError: If the width is not positive, or there are fewer than three layers.

    Source:
        Bao et al. 2022, arXiv:2209.12152, section 3.1 and figure 1.
        Differs from the paper: a join starts as the mean of the two, where the paper draws W from a normal
        distribution; even stacks are allowed.
    """

    def __init__(
        self,
        embed_dim: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim, num_layers=num_layers)
        if num_layers < 3:
            raise ArgumentError(
                f"num_layers must be 3 or more; got {num_layers}, where no layer lies between two others. "
                "Leave the skips out."
            )
        self.embed_dim, self.num_layers = embed_dim, num_layers
        self.joins = nn.ModuleList(
            nn.Linear(2 * embed_dim, embed_dim, device=device, dtype=dtype) for _ in range((num_layers - 1) // 2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every join gives the mean of what it joins: both take part from the first step."""
        for join in self.joins:
            assert isinstance(join, nn.Linear)
            with torch.no_grad():
                join.weight.copy_(0.5 * torch.eye(self.embed_dim).repeat(1, 2))
                join.bias.zero_()

    def forward(self, history: Sequence[Tensor]) -> Tensor:
        layer = len(history) - 1
        mirrored = self.num_layers - layer  # one more than the mirrored layer's number: the embeddings come first
        if mirrored >= layer:
            return history[-1]
        join = self.joins[layer - self.num_layers // 2 - 1]
        y: Tensor = join(torch.cat([history[-1], history[mirrored]], dim=-1))
        return y

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}"
