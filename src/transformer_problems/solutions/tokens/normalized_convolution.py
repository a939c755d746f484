"""A convolution with its batch norm, the brick of networks for small devices, and what it refuses."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

Stride = Literal[1, 2]


def normalized_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activates: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """norm(convolution(x)), with a SiLU behind it where it `activates`.

    The convolution has no bias, which the norm would take away again, and an odd kernel with zeros around the map, so
    that a stride of 1 keeps its size. `FoldBatchNorms` makes convolution and norm one.

    Shape:
        x: [B, in_channels, H, W]; output: [B, out_channels, ceil(H / stride), ceil(W / stride)].

    Source:
        Mehta & Rastegari 2021, arXiv:2110.02178, section 3.1, for the SiLU, which it calls Swish.
    """
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
        device=device,
        dtype=dtype,
    )
    norm = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
    return nn.Sequential(convolution, norm, *([nn.SiLU()] if activates else []))


def check_stride(name: str, stride: int) -> None:
    """Refuse what neither keeps the size of a map nor halves it.

    Raises:
        ArgumentError: Unless it is 1 or 2.
    """
    require_positive_int(**{name: stride})
    if stride not in get_args(Stride):
        raise ArgumentError(f"{name} must be 1, or 2 to halve the map; got {stride}. Halve it twice with two blocks.")


def check_map(name: str, x: Tensor, channels: int, *, norm: nn.Module, stride: int = 1) -> None:
    """Refuse what is no batch of images or feature maps, or too small a one to train batch norm on.

    Args:
        norm: The batch norm that sees the fewest places, or what stands there once it is folded.
        stride: What halves the map before that norm.

    Raises:
        ArgumentError: Unless x is floating point [B, channels, H, W] with pixels in it, and two places or more where
            the norm trains, since the variance of one is zero.
    """
    if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point() or 0 in x.shape[2:]:
        raise ArgumentError(
            f"{name} must be floating point [B, {channels}, H, W]; got {x.dtype} {list(x.shape)}. Divide whole numbers "
            f"by 255, give a single one as {name}[None], or build the module for as many channels as {name} has."
        )
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        rows, columns = (-(-size // stride) for size in x.shape[2:])
        num_places = len(x) * rows * columns
        if num_places < 2:
            raise ArgumentError(
                f"a batch must have two places or more to train batch norm; got {num_places}. Use larger batches or "
                "images, or call eval() first."
            )
