"""Shifted-window attention: tokens of an image or a clip attend within windows that move from layer to layer."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import (
    require_flag,
    require_multiple,
    require_positive_int,
    require_whole_numbers,
)
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_on_grid
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.grid_windows import GridWindows


class ShiftedWindowAttention(nn.Module):
    """Multi-head attention inside the windows of a grid, with a learned bias for each relative place and head.

    Windows do not overlap, so N tokens in windows of T cost N * T scores instead of N * N. Every second layer is
    shifted: its windows begin half a window further on, so that neighbours across a border meet. What the shift leaves
    at the two ends of an axis shares the last window, each part masked from the other, so that shifted layers have no
    more windows. Grids that windows do not fill are padded at the far ends, and nobody sees the padding.

    A window larger than the grid shrinks to it, along that axis alone, and is not shifted along it. Where the bias does
    not learn, on a CPU, it is kept together with the masks of the last grid: N * T numbers a head.

    Args:
        embed_dim: C.
        num_heads: H; C must be a multiple of it.
        window_size: Tokens along each axis of a window; as many axes as the grid has: (7, 7) or (8, 7, 7).
        shifted: Windows begin half a window further on.

    Shape:
        x: [B, *grid, C]; output: as x.

    Raises:
        ArgumentError: If a size is not positive, the heads do not divide the width, or x is no such grid of tokens.

    Source:
        Liu et al. 2021, arXiv:2103.14030, section 3.2; clips: Liu et al. 2021, arXiv:2106.13230, section 3.2.
        Differs from the papers: padding is masked, where the authors' code lets tokens see it. The papers do not say
        what becomes of a window larger than the grid: in the code of the first it shrinks along both axes to the
        smaller side and is not shifted at all, in that of the second as here.

    Example:
        >>> import torch
        >>> from transformer_problems import ShiftedWindowAttention
        >>> attention = ShiftedWindowAttention(32, num_heads=4, window_size=(7, 7), shifted=True)
        >>> attention(torch.randn(2, 56, 40, 32)).shape
        torch.Size([2, 56, 40, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        *,
        shifted: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_whole_numbers(window_size=window_size)
        if not window_size:
            raise ArgumentError("window_size must have a size for each axis of the grid; got (). Choose e.g. (7, 7).")
        for size in window_size:
            require_positive_int(window_size=size)
        require_flag(shifted=shifted)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.window_size, self.shifted = tuple(window_size), shifted
        self.qkv_proj = Linear(embed_dim, 3 * embed_dim, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        num_offsets = prod(2 * size - 1 for size in window_size)
        self.bias_table = nn.Parameter(torch.empty(num_offsets, num_heads, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self._kept: _Kept | None = None

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.window_size)
        layout = f"[B, *grid, {self.embed_dim}] with a grid of {axes} axes, as window_size={self.window_size} has"
        check_on_grid(x, layout, embed_dim=self.embed_dim, num_axes=axes)
        windows = GridWindows.of(tuple(x.shape[1:-1]), self.window_size, shifted=self.shifted, device=x.device)
        qkv = self.qkv_proj(windows.cut(x.flatten(1, -2)))
        y: Tensor = self.out_proj(windows.join(self._attend(qkv, windows)))
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shifted={self.shifted}"

    def _attend(self, qkv: Tensor, windows: GridWindows) -> Tensor:
        """[B, S, 3 C] -> [B, S, C], all windows of all images in one call."""
        lead = (len(qkv), windows.num_windows)
        heads = qkv.view(*lead, windows.length, 3, self.num_heads, self.embed_dim // self.num_heads)
        q, k, v = (part.transpose(-3, -2) for part in heads.unbind(3))  # [B, W, H, T, D]
        added = self._added(windows)
        if added.requires_grad:
            y = _attend_and_learn(q, k, v, added)
        else:
            if windows.mask is not None:
                added = added.expand(len(qkv), *added.shape).flatten(0, 1)
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype)).unflatten(0, lead)
        return y.transpose(-3, -2).flatten(-2).flatten(1, 2)

    def _added(self, windows: GridWindows) -> Tensor:
        """What is added to the scores, [W or 1, H, T, T]: kept until the grid or a number in the table changes."""
        table, kept = self.bias_table, self._kept
        learns = table.requires_grad and torch.is_grad_enabled()
        # Elsewhere than on a CPU, to compare tables would wait for the device.
        if learns or table.device.type != "cpu" or torch.compiler.is_compiling():
            return _added_scores(table, windows)
        if kept is None or kept.windows is not windows or not kept.is_of(table):
            with torch.inference_mode(False):  # or it could not take part in a later backward pass
                own = table.detach().clone()
                self._kept = kept = _Kept(windows, own, _added_scores(own, windows))
        return kept.added


def _attend_and_learn(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Attention written out: PyTorch's fused kernel for CPUs has no gradient for what is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # [B, W, H, T, T]
    scores += added
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(v.dtype)
    y: Tensor = weights @ v
    return y


def _added_scores(table: Tensor, windows: GridWindows) -> Tensor:
    bias = nn.functional.embedding(windows.offsets, table).permute(2, 0, 1).contiguous()  # [H, T, T]
    return bias[None] if windows.mask is None else bias + windows.mask


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is added to the scores in these windows, and the table that it was made of."""

    windows: GridWindows
    table: Tensor
    added: Tensor

    def is_of(self, table: Tensor) -> bool:
        return self.table.dtype == table.dtype and torch.equal(self.table, table)
