"""Images with less to see in them."""

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate


def coarser(pixels: Tensor, factor: int) -> Tensor:
    """The same number of pixels, each the mean of a square of factor x factor; doing so twice changes nothing more.

    Shape:
        pixels, output: [B, channels, height, width].
    """
    means = avg_pool2d(pixels, factor, ceil_mode=True)
    *_, height, width = pixels.shape
    spread = interpolate(means, scale_factor=float(factor), mode="nearest")
    return spread[..., :height, :width]
