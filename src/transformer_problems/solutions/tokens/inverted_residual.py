"""The inverted residual of MobileNetV2: widen, mix each channel's neighbourhood, narrow."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.solutions.tokens.normalized_convolution import (
    Stride,
    check_map,
    check_stride,
    normalized_convolution,
)


class InvertedResidual(nn.Module):
    """x + narrow(depthwise(widen(x))): only the wide middle is nonlinear, and what blocks hand on is thin.

    A 1 x 1 convolution widens, a convolution of 3 x 3 mixes the places of each channel by itself, and a 1 x 1
    convolution narrows; each has its batch norm, and the first two a SiLU. Costs E * C_in * (2 * C_in + (18 + 2 *
    C_out) / S^2) operations a place, with E the expansion and S the stride, where a plain convolution of the middle's
    width would cost 18 * E^2 * C_in^2. The skip is there where the stride is 1 and C_in = C_out.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        stride: 1, or 2 to halve the map, rounded up.
        expansion: Width of the middle, in C_in.

    Shape:
        x: [B, C_in, H, W]; output: [B, C_out, ceil(H / stride), ceil(W / stride)].

    Raises:
        ArgumentError: If a number is out of range, a map's shape or dtype does not fit, or batch norm is to be trained
            on a single place.

    Source:
        Sandler et al. 2018, arXiv:1801.04381, section 3.3 and table 1. Differs from the paper: SiLU in place of
        ReLU6, as in MobileViT (Mehta & Rastegari 2021, arXiv:2110.02178, section 3.1).

    Example:
        >>> import torch
        >>> from transformer_problems import InvertedResidual
        >>> InvertedResidual(8, 16, stride=2)(torch.zeros(2, 8, 9, 12)).shape
        torch.Size([2, 16, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: Stride = 1,
        expansion: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(in_channels=in_channels, out_channels=out_channels, expansion=expansion)
        check_stride("stride", stride)
        self.in_channels, self.stride = in_channels, stride
        self.has_skip = stride == 1 and in_channels == out_channels
        middle = expansion * in_channels
        self.widen = normalized_convolution(in_channels, middle, 1, device=device, dtype=dtype)
        self.depthwise = normalized_convolution(
            middle, middle, 3, stride=stride, groups=middle, device=device, dtype=dtype
        )
        self.narrow = normalized_convolution(middle, out_channels, 1, activates=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_channels, norm=self.depthwise[1], stride=self.stride)
        y: Tensor = self.narrow(self.depthwise(self.widen(x)))
        return x + y if self.has_skip else y

    def extra_repr(self) -> str:
        return f"stride={self.stride}, has_skip={self.has_skip}"
