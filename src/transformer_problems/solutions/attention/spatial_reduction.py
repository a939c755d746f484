"""Spatial-reduction attention: every token of an image attends to a coarser copy of the image."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.heads import merge_heads, split_heads
from transformer_problems.core.inputs import check_on_grid
from transformer_problems.kernels.linear import Linear


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values come from a coarser copy of the grid: each token sees all of it.

    With a reduction, squares of R x R tokens are each mixed into one by a convolution with stride R and a norm. N
    tokens form N * N / R^2 scores: less by R^2, and still quadratic in N. Grids that squares do not fill are padded
    with zeros at the bottom and the right, so that each token is in a square.
    With a pooled size, the grid is averaged down to P x P tokens, whatever its size, then mixed token by token, normed
    and passed through a GELU. N tokens form N * P^2 scores: linear in N, and coarser the larger the image.
    Only for images: grids of two axes.

    Args:
        embed_dim: C.
        num_heads: H; C must be a multiple of it.
        reduction: R; 1 is attention to all tokens, without convolution and norm.
        pooled_size: P, in place of a reduction. Default none.

    Shape:
        x: [B, rows, columns, C]; output: as x.

    Raises:
        ArgumentError: If a size is not positive, there are both a reduction and a pooled size, the heads do not divide
            the width, or x is no such grid of tokens.

    Source:
        Wang et al. 2021, arXiv:2102.12122, section 3.3 (reduction); Wang et al. 2021, arXiv:2106.13797, section 3.1
        (pooled size, there 7). Differs from the former: grids that squares do not fill, of which it does not speak, are
        padded, where the authors' code leaves the rest out.

    Example:
        >>> import torch
        >>> from transformer_problems import SpatialReductionAttention
        >>> attention = SpatialReductionAttention(32, num_heads=4, reduction=8)  # 35 keys for 2240 queries
        >>> attention(torch.randn(2, 56, 40, 32)).shape
        torch.Size([2, 56, 40, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        reduction: int = 1,
        *,
        pooled_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_one_coarsening(reduction, pooled_size)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.reduction, self.pooled_size = reduction, pooled_size
        self.q_proj = Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.kv_proj = Linear(embed_dim, 2 * embed_dim, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.reduce: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        if reduction > 1 or pooled_size is not None:
            self.reduce = nn.Conv2d(embed_dim, embed_dim, reduction, reduction, device=device, dtype=dtype)
            self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_on_grid(x, f"[B, rows, columns, {self.embed_dim}]", embed_dim=self.embed_dim, num_axes=2)
        q = split_heads(self.q_proj(x.flatten(1, 2)), self.num_heads)
        coarser = self.kv_proj(self._coarser(x).flatten(1, 2))
        k, v = (split_heads(part, self.num_heads) for part in coarser.chunk(2, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(merge_heads(y))
        return out.view(x.shape)

    def extra_repr(self) -> str:
        coarser = f"reduction={self.reduction}" if self.pooled_size is None else f"pooled_size={self.pooled_size}"
        return f"num_heads={self.num_heads}, {coarser}"

    def _coarser(self, x: Tensor) -> Tensor:
        """[B, rows, columns, C] -> [B, ceil(rows / R), ceil(columns / R), C], or [B, P, P, C]."""
        if self.reduce is None or self.norm is None:
            return x
        if self.pooled_size is not None:
            pooled = nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), self.pooled_size)
            return nn.functional.gelu(self.norm(self.reduce(pooled).movedim(1, -1)))
        below, right = (-size % self.reduction for size in x.shape[1:3])
        if below or right:
            x = nn.functional.pad(x, (0, 0, 0, right, 0, below))
        y: Tensor = self.norm(self.reduce(x.movedim(-1, 1)).movedim(1, -1))
        return y


def require_one_coarsening(reduction: int, pooled_size: int | None) -> None:
    """Raise ArgumentError unless one of the two makes keys fewer, or neither, and both are sizes."""
    require_positive_int(reduction=reduction)
    if pooled_size is None:
        return
    require_positive_int(pooled_size=pooled_size)
    if reduction != 1:
        raise ArgumentError(
            f"reduction must be 1 with a pooled_size, which takes its place; got {reduction}. Leave one of them out."
        )
