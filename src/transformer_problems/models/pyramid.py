"""The Pyramid Vision Transformer: stages from fine to coarse, each attending to a coarser copy of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_on_grid, shown
from transformer_problems.models.grid import GridBlock, GridPatches, GridStage
from transformer_problems.solutions.attention.spatial_reduction import (
    SpatialReductionAttention,
    require_one_coarsening,
)
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding


@dataclass(frozen=True, slots=True)
class PyramidStage:
    """One stage of a PyramidTransformer.

    Args:
        embed_dim: C, its width.
        depth: Its layers.
        num_heads: H.
        reduction: R: a layer attends to one token for each R x R of its own.
        stride: Pixels, or tokens of the stage before, from one token to the next, along each axis.
        expansion: Inner width of the feed-forward networks, in C.
        pooled_size: P: it attends to P x P tokens in all, in place of a reduction. Default none.

    Raises:
        ArgumentError: If a size is not positive, the heads do not divide the width, or there are both a reduction and
            a pooled size.
    """

    embed_dim: int
    depth: int
    num_heads: int
    reduction: int = 1
    stride: int = 2
    expansion: int = 4
    pooled_size: int | None = None

    def __post_init__(self) -> None:
        require_multiple("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        require_positive_int(depth=self.depth, stride=self.stride, expansion=self.expansion)
        require_one_coarsening(self.reduction, self.pooled_size)


class PyramidTransformer(nn.Module):
    """Runs stages that each embed the grid of the one before into a coarser one, and classifies the mean of the last.

    A stage embeds overlapping patches of 2 S - 1 tokens, S apart, and its layers are spatial-reduction attention and a
    feed-forward network with a depthwise convolution. The zeros around that convolution tell tokens where they are, so
    nothing else encodes positions and images of any size will do. Early stages have many tokens and large reductions,
    late ones few tokens and none: attention costs the product of tokens and reduced tokens, which is quadratic in the
    number of pixels, or linear with pooled sizes, and all the rest is linear. Only for images, not for clips.

    Args:
        stages: From fine to coarse.
        num_classes: K.
        in_channels: C_in, channels of an image.

    Shape:
        images: [B, C_in, H, W]; output: logits [B, K].

    Raises:
        ArgumentError: If `stages` is no tuple of one stage or more, a size is not positive, or an image does not fit.

    Source:
        Wang et al. 2021, arXiv:2102.12122, section 3; overlapping patches, convolution and pooled sizes (PVT v2):
        Wang et al. 2021, arXiv:2106.13797, section 3. Differs from the papers: no dropout of layers (stochastic depth).

    Example:
        >>> from transformer_problems import PyramidStage, PyramidTransformer
        >>> stages = (PyramidStage(32, 2, num_heads=1, reduction=4, stride=4), PyramidStage(64, 2, num_heads=2))
        >>> model = PyramidTransformer(stages, num_classes=10)
    """

    def __init__(
        self,
        stages: Sequence[PyramidStage],
        num_classes: int,
        *,
        in_channels: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_classes=num_classes, in_channels=in_channels)
        if not isinstance(stages, tuple | list) or not stages or not all(isinstance(s, PyramidStage) for s in stages):
            got = shown(stages) if stages != () else "none"
            raise ArgumentError(
                f"stages must be a tuple of one PyramidStage or more; got {got}. Pass e.g. (PyramidStage(32, 2, 1),)."
            )
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList()
        for stage in stages:
            self.stages.append(_stage(stage, in_channels, device=device, dtype=dtype))
            self.norms.append(nn.LayerNorm(stage.embed_dim, device=device, dtype=dtype))
            in_channels = stage.embed_dim
        self.embed_dim = in_channels
        self.head = nn.Linear(in_channels, num_classes, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1, 2).mean(dim=1))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """All tokens of the last stage after its norm, [B, rows, columns, `embed_dim`]."""
        x = images
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = norm(stage(x)).movedim(-1, 1)
        return x.movedim(1, -1)


class ConvolutionFeedForward(nn.Module):
    """down(gelu(depthwise(up(x)))): each inner channel mixes the 3 x 3 places around its own, zeros beyond the edges.

    Args:
        embed_dim: C.
        expansion: Inner width, in C.

    Shape:
        x: [B, rows, columns, C]; output: as x.

    Raises:
        ArgumentError: If a size is not positive, or x is no such grid of tokens.

    Source:
        Wang et al. 2021, arXiv:2106.13797, section 3.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        expansion: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim, expansion=expansion)
        self.embed_dim, inner = embed_dim, expansion * embed_dim
        self.up = nn.Linear(embed_dim, inner, device=device, dtype=dtype)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, device=device, dtype=dtype)
        self.down = nn.Linear(inner, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_on_grid(x, f"[B, rows, columns, {self.embed_dim}]", embed_dim=self.embed_dim, num_axes=2)
        mixed = self.depthwise(self.up(x).movedim(-1, 1)).movedim(1, -1)
        y: Tensor = self.down(nn.functional.gelu(mixed))
        return y


def _stage(
    stage: PyramidStage, in_channels: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> GridStage:
    width = stage.embed_dim
    patches = PatchEmbedding(
        width, 2 * stage.stride - 1, in_channels=in_channels, stride=stage.stride, device=device, dtype=dtype
    )
    blocks = [
        GridBlock(
            width,
            SpatialReductionAttention(
                width, stage.num_heads, stage.reduction, pooled_size=stage.pooled_size, device=device, dtype=dtype
            ),
            feed_forward=partial(ConvolutionFeedForward, expansion=stage.expansion),
            device=device,
            dtype=dtype,
        )
        for _ in range(stage.depth)
    ]
    return GridStage(GridPatches(patches, device=device, dtype=dtype), blocks)
