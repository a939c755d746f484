"""A convolutional stem: a few convolutions turn an image into tokens, in place of patches."""

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple_of, require_positive_int
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.inputs import check_images, check_same_dtype

Downsampling = Literal["stride", "pool"]


class ConvolutionalStem(nn.Module):
    """Halves an image S times by convolutions of 3 x 3 whose widths double up to C, and makes each place a token.

    A token sees 2^(S + 1) - 1 pixels a side or more, some of them in common with its neighbours, and equal surroundings
    make equal tokens wherever they lie; only beyond the borders all is zero. Images of any size will do: halves are
    rounded up. A VisionTransformer on such tokens is a CNN with a Transformer behind it.

    "stride": each stage is a convolution of stride 2, batch norm and ReLU; a 1 x 1 convolution follows the last. In
    training the images of a batch share their statistics.
    "pool": each stage is a convolution of stride 1, ReLU and a max pool of 3 x 3 and stride 2; no norm, no biases.
    The convolutions cost four times as much.

    Args:
        embed_dim: C, a multiple of 2^(S - 1).
        num_stages: S; a token stands for 2^S x 2^S pixels.
        in_channels: C_in, channels of an image.
        downsampling: What halves the image, "stride" or "pool".

    Shape:
        images: [B, C_in, H, W]; output: [B, N, C] with N = rows * columns of `grid(H, W)`.

    Raises:
        ArgumentError: If a number is out of range, widths cannot double up to C, an image's shape or dtype does not
            fit, or batch norm is to be trained on a single token.
        UnknownNameError: If there is no such downsampling.

    Source:
        "stride": Xiao et al. 2021, arXiv:2106.14881, section 3; "pool": Hassani et al. 2021, arXiv:2104.05704, section
        3. Differs from the papers: no convolutions of 7 x 7 (the latter), none of stride 1 between those of stride 2
        (the larger models of the former), and stages double their widths, where those of the latter have 64 channels
        before the last.

    Example:
        >>> from transformer_problems import ConvolutionalStem, SelfAttention, VisionTransformer
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, is_causal=False)
        >>> stem = ConvolutionalStem(64, num_stages=2)
        >>> model = VisionTransformer(stem, (32, 32), num_layers=2, mixer=mixer, num_classes=10)
    """

    def __init__(
        self,
        embed_dim: int,
        num_stages: int,
        *,
        in_channels: int = 3,
        downsampling: Downsampling = "stride",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim, num_stages=num_stages, in_channels=in_channels)
        if num_stages > embed_dim.bit_length():
            raise ArgumentError(
                f"num_stages must be at most {embed_dim.bit_length()}, as widths double up to embed_dim={embed_dim}; "
                f"got {num_stages}. Choose fewer stages, or a larger embed_dim."
            )
        require_multiple_of("embed_dim", embed_dim, 2 ** (num_stages - 1), f"as widths double in {num_stages} stages")
        if downsampling not in get_args(Downsampling):
            raise UnknownNameError("downsampling", downsampling, get_args(Downsampling))
        self.embed_dim, self.num_stages = embed_dim, num_stages
        self.in_channels, self.downsampling = in_channels, downsampling
        widths = [embed_dim // 2**i for i in reversed(range(num_stages))]
        self.stages = nn.Sequential(
            *(_stage(*pair, downsampling, device=device, dtype=dtype) for pair in pairwise([in_channels, *widths]))
        )
        self.projection: nn.Module = nn.Identity()
        if downsampling == "stride":
            self.projection = nn.Conv2d(embed_dim, embed_dim, 1, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        tokens: Tensor = self.projection(self.stages(images)).flatten(2).transpose(1, 2)
        return tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of such an image: its size halved S times, rounded up.

        Raises:
            ArgumentError: If a size is not positive.
        """
        require_positive_int(height=height, width=width)
        shrink = 2**self.num_stages
        return -(-height // shrink), -(-width // shrink)

    def extra_repr(self) -> str:
        return f"num_stages={self.num_stages}, downsampling={self.downsampling!r}"

    def _check_images(self, images: Tensor) -> None:
        weight = next(self.stages.parameters())
        check_images(images, weight, "ConvolutionalStem")
        check_same_dtype("images", images, weight, "ConvolutionalStem")
        rows, columns = self.grid(*images.shape[2:])
        num_tokens = len(images) * rows * columns
        if self.downsampling == "stride" and self.training and num_tokens < 2:
            raise ArgumentError(
                f"a batch must make two tokens or more to train the batch norm of downsampling='stride'; got "
                f"{num_tokens}. Use larger batches or images, or downsampling='pool'."
            )


def _stage(
    in_dim: int,
    out_dim: int,
    downsampling: Downsampling,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    """[B, in_dim, H, W] -> [B, out_dim, ceil(H / 2), ceil(W / 2)]."""
    stride = 2 if downsampling == "stride" else 1
    convolution = nn.Conv2d(in_dim, out_dim, 3, stride=stride, padding=1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # without a norm, signals would fade otherwise
    if downsampling == "stride":
        return nn.Sequential(convolution, nn.BatchNorm2d(out_dim, device=device, dtype=dtype), nn.ReLU())
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
