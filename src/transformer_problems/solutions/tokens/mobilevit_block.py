"""The MobileViT block: a convolution whose middle, the product of a window with weights, is a Transformer."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.tokens.normalized_convolution import (
    check_map,
    normalized_convolution,
)


class LayersFactory(Protocol):
    """Makes a Transformer layer or a stack of them, [B, N, C] -> [B, N, C]."""

    def __call__(
        self, embed_dim: int, /, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module: ...


class MobileViTBlock(nn.Module):
    """fuse([x, out(fold(norm(layers(unfold(enter(local(x)))))))]): near places by convolution, far ones by attention.

    A convolution of 3 x 3 mixes each place with those around it and one of 1 x 1 makes it a token of width C. The map
    is cut into patches of P x P places, and the layers see P^2 sequences, each of one place of all patches: the top
    left ones, those beside them, and so on. Convolutions of 1 x 1 back to the map's channels and of 3 x 3 over input
    and result together end the block.

    Attention costs P^2 times less than over all places. A place still hears of every other, for those that attention
    leaves out are within the reach of a convolution from one that it reads; with P > 3 some are not. Tokens stay where
    they lie and convolutions see the zeros beyond the borders, so nothing else encodes positions and maps of any size
    will do. Those that patches do not divide are interpolated to the next larger size that they do, and back after the
    layers; a graph that was exported interpolates all sizes or none, as its example.

    Args:
        channels: Of the map.
        embed_dim: C, the width of the layers.
        layers: Called once with C; makes the Transformer layer or the stack of them. The last norm is the block's.
        patch_size: P.

    Shape:
        x: [B, channels, H, W]; output: as x.

    Raises:
        ArgumentError: If a number is not positive, `layers` is a module in place of what makes one, a map's shape or
            dtype does not fit, or batch norm is to be trained on a single place.

    Source:
        Mehta & Rastegari 2021, arXiv:2110.02178, section 3.1 and figure 1b. The paper leaves open what becomes of maps
        that patches do not divide; interpolation is what the authors' code does. Zeros would be read as tokens, or
        need a mask in every layer.

    Example:
        >>> import torch
        >>> from transformer_problems import MobileViTBlock, SelfAttention
        >>> from transformer_problems.models.block import TransformerBlock
        >>> def layer(embed_dim, *, device=None, dtype=None):
        ...     options = {"device": device, "dtype": dtype}
        ...     mixer = SelfAttention(embed_dim, num_heads=4, is_causal=False, **options)
        ...     return TransformerBlock(embed_dim, mixer, **options)
        >>> MobileViTBlock(8, 16, layer)(torch.zeros(2, 8, 9, 12)).shape
        torch.Size([2, 8, 9, 12])
    """

    def __init__(
        self,
        channels: int,
        embed_dim: int,
        layers: LayersFactory,
        *,
        patch_size: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(channels=channels, embed_dim=embed_dim, patch_size=patch_size)
        if isinstance(layers, nn.Module) or not callable(layers):
            raise ArgumentError(
                f"layers must be a function that makes Transformer layers of width {embed_dim}; got "
                f"{type(layers).__name__}. Pass what is called as layers(embed_dim, device=..., dtype=...)."
            )
        self.channels, self.patch_size = channels, patch_size
        self.local = normalized_convolution(channels, channels, 3, device=device, dtype=dtype)
        self.enter = nn.Conv2d(channels, embed_dim, 1, bias=False, device=device, dtype=dtype)
        self.layers = layers(embed_dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.out = normalized_convolution(embed_dim, channels, 1, device=device, dtype=dtype)
        self.fuse = normalized_convolution(2 * channels, channels, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.channels, norm=self.local[1])
        height, width = x.shape[2:]
        rows, columns = (-(-size // self.patch_size) for size in (height, width))
        far = self._resized(self.enter(self.local(x)), rows * self.patch_size, columns * self.patch_size)
        tokens = self.norm(self.layers(self._unfold(far)))
        far = self._resized(self._fold(tokens, rows, columns), height, width)
        y: Tensor = self.fuse(torch.cat([x, self.out(far)], dim=1))
        return y

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"

    def _unfold(self, x: Tensor) -> Tensor:
        """Sequences of the same place of all patches, [B, C, H, W] -> [B * P * P, rows * columns, C]."""
        size = self.patch_size
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, rows, P, columns, P]
        return x.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(0, 2)

    def _fold(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """[B * P * P, rows * columns, C] -> [B, C, H, W]."""
        size = self.patch_size
        x = tokens.view(len(tokens) // size**2, size, size, rows, columns, tokens.shape[2])
        return x.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)

    @staticmethod
    def _resized(x: Tensor, height: int, width: int) -> Tensor:
        if x.shape[2:] == (height, width):
            return x
        return interpolate(x, (height, width), mode="bilinear", align_corners=False)
