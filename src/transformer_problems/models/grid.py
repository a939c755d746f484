"""What vision models that keep their tokens on a grid are made of."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from transformer_problems.core.fit import check_built_for
from transformer_problems.models.block import FeedForward, PartFactory
from transformer_problems.solutions.normalization.pre_norm import PreNorm


class GridEmbedding(Protocol):
    """Turns images or clips into tokens that lie on a grid, row by row: PatchEmbedding, TubeletEmbedding.

    Shape:
        images: [B, C_in, *sizes]; output: [B, N, C] with N the product of `grid(*sizes)`, C = `embed_dim`.
    """

    embed_dim: int

    @property
    def grid(self) -> Callable[..., tuple[int, ...]]:
        """Tokens along each axis, of the sizes of such an image or clip."""
        ...

    def __call__(self, images: Tensor) -> Tensor: ...


class GridPatches(nn.Module):
    """Embeds images or clips, and normalises the tokens where they lie.

    Shape:
        images: [B, C_in, *sizes]; output: [B, *grid, C].
    """

    def __init__(
        self,
        patches: GridEmbedding,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.norm = nn.LayerNorm(patches.embed_dim, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).unflatten(1, self.patches.grid(*images.shape[2:]))
        x: Tensor = self.norm(tokens)
        return x


class GridBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)): a pre-norm layer whose tokens lie on a grid.

    Args:
        embed_dim: C.
        mixer: Moves information between places of the grid, [B, *grid, C] -> the same.
        feed_forward: Makes the feed-forward network, [B, *grid, C] -> the same.

    Shape:
        x: [B, *grid, C]; output: as x.

    Raises:
        CombinationError: If the mixer is a class, or built for another width.

    Source:
        Liu et al. 2021, arXiv:2103.14030, equation 3.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: nn.Module,
        *,
        feed_forward: PartFactory = FeedForward,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_built_for(mixer, embed_dim=embed_dim)
        self.mixer_residual = PreNorm(embed_dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.feed_forward_residual = PreNorm(embed_dim, device=device, dtype=dtype)
        self.feed_forward = feed_forward(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer_residual(x, self.mixer)
        y: Tensor = self.feed_forward_residual(x, self.feed_forward)
        return y


class GridStage(nn.Module):
    """Blocks of one width behind an entrance that brings what comes before to that width and resolution.

    Shape:
        x: whatever the entrance takes; output: [B, *grid, C].
    """

    def __init__(self, entrance: nn.Module, blocks: Iterable[GridBlock]) -> None:
        super().__init__()
        self.entrance = entrance
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        for block in self.blocks:
            x = block(x)
        return x
