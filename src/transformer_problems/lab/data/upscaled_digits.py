"""Real images drawn larger, for what resolution costs: more pixels, and nothing more to see in them."""

from torch.nn.functional import interpolate

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.digits import Images


def upscaled(images: Images, size: int) -> Images:
    """The same images with `size` pixels a side, by bilinear interpolation; pixels stay from 0 to 1.

    Raises:
        ArgumentError: If the size is no positive whole number, or pixels are not of floating point.
    """
    require_positive_int(size=size)
    if not images.pixels.is_floating_point():
        raise ArgumentError(
            f"images must have pixels of floating point from 0 to 1; got {images.pixels.dtype}. Divide bytes by 255."
        )
    return Images(interpolate(images.pixels, size=(size, size), mode="bilinear"), images.classes)
