"""MobileViT: convolutions where pixels are many, Transformer layers where they have become few."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.block import TransformerBlock
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.inverted_residual import InvertedResidual
from transformer_problems.solutions.tokens.mobilevit_block import MobileViTBlock
from transformer_problems.solutions.tokens.normalized_convolution import (
    Stride,
    check_map,
    check_stride,
    normalized_convolution,
)


@dataclass(frozen=True, slots=True)
class MobileViTStage:
    """One stage of a MobileViT.

    Args:
        channels: Of its maps.
        stride: 2 halves the maps, rounded up; 1 keeps their size.
        depth: Its inverted residuals; the first has the stride.
        embed_dim: C, the width of the Transformer layers behind them. Default no such layers.
        num_layers: L, Transformer layers.
        num_heads: H.

    Raises:
        ArgumentError: If a number is not positive, or the heads do not divide the width.
    """

    channels: int
    stride: Stride = 2
    depth: int = 1
    embed_dim: int | None = None
    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        require_positive_int(channels=self.channels, depth=self.depth, num_layers=self.num_layers)
        check_stride("stride", self.stride)
        if self.embed_dim is not None:
            require_multiple("embed_dim", self.embed_dim, "num_heads", self.num_heads)


class MobileViT(nn.Module):
    """A convolution, stages of inverted residuals with a MobileViT block behind some, and a head over the mean place.

    Early stages, whose maps are large, are convolutions that cost little; attention comes where maps are small, over
    one place of each patch at a time. Nothing encodes positions, so images of any size will do; cost is linear in their
    pixels but for the products of attention. For fast answers to single images fold the batch norms of the trained
    model, which leaves only convolutions, SiLUs and the layers: FoldBatchNorms()(model.eval()).

    Args:
        stages: From fine to coarse.
        num_classes: K.
        in_channels: C_in, channels of an image.
        stem_channels: Of the first convolution.
        stem_stride: Its stride; 1 for small images.
        head_channels: Width of what the head reads. Default four times the last stage's channels.
        expansion: Of the inverted residuals.
        patch_size: P, of the MobileViT blocks.

    Shape:
        images: [B, C_in, H, W]; output: logits [B, K].

    Raises:
        ArgumentError: If stages are none or something else, a number is out of range, an image does not fit, or batch
            norm is to be trained on a single place.

    Source:
        Mehta & Rastegari 2021, arXiv:2110.02178, section 3 and appendix A. Differs from the authors' code: no dropout,
        and widths of inverted residuals are not rounded to multiples of eight.

    Example:
        >>> from transformer_problems import MobileViT, MobileViTStage
        >>> stages = (MobileViTStage(16, stride=1), MobileViTStage(24, depth=2), MobileViTStage(32, embed_dim=48))
        >>> model = MobileViT(stages, num_classes=10)
    """

    def __init__(
        self,
        stages: Sequence[MobileViTStage],
        num_classes: int,
        *,
        in_channels: int = 3,
        stem_channels: int = 16,
        stem_stride: Stride = 2,
        head_channels: int | None = None,
        expansion: int = 4,
        patch_size: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_classes=num_classes, in_channels=in_channels, stem_channels=stem_channels)
        check_stride("stem_stride", stem_stride)
        if not stages or not all(isinstance(stage, MobileViTStage) for stage in stages):
            raise ArgumentError(
                f"stages must be one MobileViTStage or more; got {stages!r}. Pass e.g. (MobileViTStage(32, "
                "embed_dim=48),)."
            )
        self.embed_dim = 4 * stages[-1].channels if head_channels is None else head_channels
        require_positive_int(head_channels=self.embed_dim)
        self.in_channels, self.stem_stride = in_channels, stem_stride
        self.stem = normalized_convolution(
            in_channels, stem_channels, 3, stride=stem_stride, device=device, dtype=dtype
        )
        self.stages = nn.Sequential()
        channels = stem_channels
        for stage in stages:
            self.stages.append(_stage(stage, channels, expansion, patch_size, device=device, dtype=dtype))
            channels = stage.channels
        self.widen = normalized_convolution(channels, self.embed_dim, 1, device=device, dtype=dtype)
        self.head = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1, 2).mean(dim=1))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """The map that the head reads the mean place of, [B, rows, columns, `embed_dim`]."""
        check_map("images", images, self.in_channels, norm=self.stem[1], stride=self.stem_stride)
        x: Tensor = self.widen(self.stages(self.stem(images)))
        return x.movedim(1, -1)


class SiLUFeedForward(nn.Module):
    """down(silu(up(x))) with an inner width of 2 C.

    Args:
        embed_dim: C.

    Shape:
        x: [..., C]; output: as x.

    Source:
        Mehta & Rastegari 2021, arXiv:2110.02178, section 3.1 and appendix A.
    """

    def __init__(
        self, embed_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, 2 * embed_dim, device=device, dtype=dtype)
        self.down = nn.Linear(2 * embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


class _Layers(nn.Module):
    """Pre-norm layers of full attention."""

    def __init__(
        self,
        embed_dim: int,
        *,
        num_layers: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                SelfAttention(embed_dim, num_heads, is_causal=False, bias=True, device=device, dtype=dtype),
                feed_forward=SiLUFeedForward,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _stage(
    stage: MobileViTStage,
    in_channels: int,
    expansion: int,
    patch_size: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    made = nn.Sequential()
    for i in range(stage.depth):
        made.append(
            InvertedResidual(
                stage.channels if i else in_channels,
                stage.channels,
                stride=1 if i else stage.stride,
                expansion=expansion,
                device=device,
                dtype=dtype,
            )
        )
    if stage.embed_dim is not None:
        layers = partial(_Layers, num_layers=stage.num_layers, num_heads=stage.num_heads)
        made.append(
            MobileViTBlock(stage.channels, stage.embed_dim, layers, patch_size=patch_size, device=device, dtype=dtype)
        )
    return made
