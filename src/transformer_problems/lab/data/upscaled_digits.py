"""Real images drawn larger, for what resolution costs: more pixels, and nothing more to see in them."""

from torch.nn.functional import interpolate

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.lab.data.digits import Images


def upscaled(images: Images, size: int) -> Images:
    """The same images with `size` pixels a side, by bilinear interpolation; pixels stay from 0 to 1.

    Raises:
        ArgumentError: If the size is no positive whole number.
    """
    require_positive_int(size=size)
    return Images(interpolate(images.pixels, size=(size, size), mode="bilinear"), images.classes)
