"""Patch merging: four neighbouring tokens of a grid become one, wider token."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_floating


class PatchMerging(nn.Module):
    """linear(norm(the four tokens of each 2 x 2 square, side by side)): a quarter of the tokens, twice as wide.

    Only the last two axes of the grid are merged, so the frames of a clip stay apart. Odd axes are padded with a row of
    zeros at the end.

    Args:
        embed_dim: C.
        out_dim: Width of the merged tokens. Default 2 C.

    Shape:
        x: [B, ..., H, W, C]; output: [B, ..., ceil(H / 2), ceil(W / 2), out_dim].

    Raises:
        ArgumentError: If a size is not positive, or x is no such grid.

    Source:
        Liu et al. 2021, arXiv:2103.14030, section 3.1; clips: Liu et al. 2021, arXiv:2106.13230, section 3.1.
        Differs from the papers: the norm, and the order of the four tokens (column by column), which they leave open,
        are those of the authors' code.

    Example:
        >>> import torch
        >>> from transformer_problems import PatchMerging
        >>> PatchMerging(32)(torch.randn(2, 7, 8, 32)).shape
        torch.Size([2, 4, 4, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim)
        out_dim = 2 * embed_dim if out_dim is None else out_dim
        require_positive_int(out_dim=out_dim)
        self.embed_dim = embed_dim
        self.norm = nn.LayerNorm(4 * embed_dim, device=device, dtype=dtype)
        self.projection = nn.Linear(4 * embed_dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_floating("x", x)
        if x.dim() < 4 or x.shape[-1] != self.embed_dim:
            raise ArgumentError(
                f"x must be [B, ..., H, W, {self.embed_dim}]; got {list(x.shape)}. "
                "Give tokens [B, N, C] as x.unflatten(1, grid)."
            )
        height, width = x.shape[-3:-1]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        squares = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # [B, ..., H / 2, 2, W / 2, 2, C]
        y: Tensor = self.projection(self.norm(squares.movedim(-4, -2).flatten(-3)))
        return y
