"""One learned vector for each place of a grid, interpolated for grids of other sizes, as in ViT."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int, require_sizes
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_floating


class LearnedGridPositions(nn.Module):
    """Adds a learned [rows, columns, C] table to tokens that lie on a grid, row by row.

    For a grid of another size the table is stretched over it as an image would be (bicubic), so a model takes images
    larger or smaller than those it was trained on, at some loss that fine-tuning makes good.

    Args:
        rows: Of the table.
        columns: Of the table.
        embed_dim: C.

    Shape:
        x: [B, N, C]; grid: (rows, columns) of the tokens, N = rows * columns; output: as x.

    Raises:
        ArgumentError: If a size is not positive, `grid` is no such pair, or the tokens do not make it up.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, sections 3.1 and 3.2.
        Differs from the paper: bicubic, where it does not say which interpolation is used.

    Example:
        >>> import torch
        >>> from transformer_problems import LearnedGridPositions
        >>> positions = LearnedGridPositions(8, 8, embed_dim=64)
        >>> positions(torch.randn(2, 12 * 10, 64), (12, 10)).shape  # the table stretched over a larger image
        torch.Size([2, 120, 64])
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(rows=rows, columns=columns, embed_dim=embed_dim)
        self.rows, self.columns, self.embed_dim = rows, columns, embed_dim
        self.weight = nn.Parameter(torch.empty(rows, columns, embed_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        require_sizes("grid", grid, ("rows", "columns"))
        check_floating("x", x)
        rows, columns = grid
        if x.dim() != 3 or x.shape[1:] != (rows * columns, self.embed_dim):
            raise ArgumentError(
                f"x must be [B, {rows * columns}, {self.embed_dim}], one token for each place of the grid {rows} x "
                f"{columns}; got {list(x.shape)}. Pass the grid that the image's patches make, patches.grid(H, W)."
            )
        return x + self._table(rows, columns).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, embed_dim={self.embed_dim}"

    def _table(self, rows: int, columns: int) -> Tensor:
        """[rows, columns, C]."""
        if (rows, columns) == (self.rows, self.columns):
            return self.weight
        image = self.weight.permute(2, 0, 1)[None]
        return nn.functional.interpolate(image, size=(rows, columns), mode="bicubic")[0].permute(1, 2, 0)
