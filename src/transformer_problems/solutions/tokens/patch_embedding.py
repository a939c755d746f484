"""Patch embedding: an image becomes a sequence of tokens, one for each patch of pixels."""

from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_flag, require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.inputs import check_images, check_same_dtype


class PatchEmbedding(nn.Module):
    """Cuts images into square patches and projects each of them to a token, row by row.

    Patches of P x P pixels make P^2 times fewer tokens than pixels, so attention costs P^4 times less. Detail within a
    patch must survive one linear map. Patches that overlap see across each other's borders, at P^2 / stride^2 times
    the cost of the projection. Every pixel lies in a patch: images of other sizes are refused, or padded with `pad`.

    Args:
        embed_dim: C.
        patch_size: P, side of a patch in pixels.
        in_channels: C_in, channels of an image.
        stride: Pixels from one patch to the next. Default P; less makes patches overlap.
        padding: Rows and columns of zeros around the image. Default P // 2 where patches overlap, else 0.
        pad: Take images of any size, with as many zeros more at the right and the bottom as patches need.

    Shape:
        images: [B, C_in, H, W]; output: [B, N, C] with N = rows * columns of `grid(H, W)`.

    Raises:
        ArgumentError: If a number is out of range, or an image's shape, dtype or size does not fit.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; overlap: Wang et al. 2021, arXiv:2106.13797, section
        3.2. Differs from the latter: no norm after the projection.

    Example:
        >>> import torch
        >>> from transformer_problems import PatchEmbedding
        >>> patches = PatchEmbedding(64, patch_size=4, pad=True)
        >>> patches(torch.rand(2, 3, 30, 32)).shape, patches.grid(30, 32)
        (torch.Size([2, 64, 64]), (8, 8))
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        *,
        in_channels: int = 3,
        stride: int | None = None,
        padding: int | None = None,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        stride = patch_size if stride is None else stride
        require_positive_int(embed_dim=embed_dim, patch_size=patch_size, in_channels=in_channels, stride=stride)
        padding = (patch_size // 2 if stride < patch_size else 0) if padding is None else padding
        require_not_negative(padding=padding)
        require_flag(pad=pad)
        for name, value, limit in (("stride", stride, patch_size), ("padding", padding, patch_size - 1)):
            if value > limit:
                raise ArgumentError(
                    f"{name} must be at most {limit}, so that patches of {patch_size} pixels miss none and none is "
                    f"all padding; got {value}. Choose {name}={limit} or less."
                )
        self.embed_dim, self.patch_size, self.in_channels = embed_dim, patch_size, in_channels
        self.stride, self.padding, self.pad = stride, padding, pad
        self.projection = nn.Conv2d(in_channels, embed_dim, patch_size, stride, device=device, dtype=dtype)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, C_in * P * P."""
        return self.in_channels * self.patch_size**2

    def forward(self, images: Tensor) -> Tensor:
        overlap = self.stride < self.patch_size
        x = self._padded(images) if overlap else self.cut(images)
        check_same_dtype("images", x, self.projection.weight, "PatchEmbedding")
        if overlap:
            tokens: Tensor = self.projection(x).flatten(2).transpose(1, 2)
            return tokens
        # the same sums as one matrix product
        return nn.functional.linear(x, self.projection.weight.flatten(1), self.projection.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of such an image.

        Raises:
            ArgumentError: If patches do not fill it, unless `pad` is set.
        """
        require_positive_int(height=height, width=width)
        for name, size in (("height", height), ("width", width)):
            if not self.pad and not self._fits(size):
                near = [n for n in (self._nearest(range(size, 0, -1)), self._nearest(count(size))) if n is not None]
                raise ArgumentError(
                    f"an image's {name} must be filled by patches of {self.patch_size} pixels, {self.stride} apart; "
                    f"got {size}. Resize it to {' or '.join(map(str, near))}, or build PatchEmbedding with pad=True."
                )
        return self._num_patches(height), self._num_patches(width)

    def cut(self, images: Tensor) -> Tensor:
        """The pixels of each patch, [B, C_in, H, W] -> [B, N, C_in * P * P], ordered by channel, row and column.

        Raises:
            CombinationError: If patches overlap, for then a pixel would belong to several.
        """
        if self.stride < self.patch_size:
            raise CombinationError(
                f"patches of {self.patch_size} pixels, {self.stride} apart, overlap, so images cannot be cut into "
                f"them. Build PatchEmbedding with stride={self.patch_size}."
            )
        x, size = self._padded(images), self.patch_size
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C_in, rows, P, columns, P]
        y: Tensor = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return y

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}, padding={self.padding}, pad={self.pad}"

    def _num_patches(self, size: int) -> int:
        """As many as a convolution makes, and one more where that would miss the last pixels."""
        made = (size + 2 * self.padding - self.patch_size) // self.stride + 1
        needed = -(-(size + self.padding - self.patch_size) // self.stride) + 1
        return max(made, needed, 1)

    def _span(self, size: int) -> int:
        """Pixels and zeros from the first patch to the last."""
        return (self._num_patches(size) - 1) * self.stride + self.patch_size

    def _fits(self, size: int) -> bool:
        return self._span(size) <= size + 2 * self.padding

    def _nearest(self, sizes: Iterable[int]) -> int | None:
        return next((size for size in sizes if self._fits(size)), None)

    def _padded(self, images: Tensor) -> Tensor:
        """The images with the zeros that patches take in, and no more."""
        check_images(images, self.projection.weight, "PatchEmbedding")
        height, width = images.shape[-2:]
        self.grid(height, width)
        below, right = (self._span(size) - self.padding - size for size in (height, width))
        if not (self.padding or below or right):
            return images
        return nn.functional.pad(images, (self.padding, right, self.padding, below))
