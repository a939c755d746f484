"""Tubelet embedding: a clip becomes a sequence of tokens, one for each block of pixels in space and time."""

from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_flag, require_multiple_of, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.fit import check_built_for
from transformer_problems.core.inputs import check_clips, check_same_dtype, shown
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

Initialisation = Literal["central", "inflate"]


class TubeletEmbedding(nn.Module):
    """Cuts clips into blocks of t frames by P x P pixels and projects each to a token, step by step and row by row.

    A clip makes t times fewer tokens than its frames would make patches, so attention over all of them costs t^2 times
    less, and what moves within t frames lies inside one token. What must survive is that much more for one linear map.
    Clips that tubelets do not fill are refused, or padded with `pad`.

    Args:
        embed_dim: C.
        patch_size: P, side of a tubelet in pixels.
        tubelet_len: t, frames of a tubelet.
        in_channels: C_in, channels of a frame.
        pad: Take clips of any size, with as many zeros more at the end, the right and the bottom as tubelets need.

    Shape:
        clips: [B, C_in, T, H, W]; output: [B, N, C] with N = steps * rows * columns of `grid(T, H, W)`.

    Raises:
        ArgumentError: If a number is out of range, or a clip's shape, dtype or size does not fit.

    Source:
        Arnab et al. 2021, arXiv:2103.15691, section 3.2; `from_patches`: section 3.4.

    Example:
        >>> import torch
        >>> from transformer_problems import TubeletEmbedding
        >>> tubelets = TubeletEmbedding(64, patch_size=8, tubelet_len=2)
        >>> tubelets(torch.randn(1, 3, 16, 32, 32)).shape, tubelets.grid(16, 32, 32)
        (torch.Size([1, 128, 64]), (8, 4, 4))
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        tubelet_len: int,
        *,
        in_channels: int = 3,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(
            embed_dim=embed_dim, patch_size=patch_size, tubelet_len=tubelet_len, in_channels=in_channels
        )
        require_flag(pad=pad)
        self.embed_dim, self.patch_size, self.tubelet_len = embed_dim, patch_size, tubelet_len
        self.in_channels, self.pad = in_channels, pad
        size = (tubelet_len, patch_size, patch_size)
        self.projection = nn.Conv3d(in_channels, embed_dim, size, stride=size, device=device, dtype=dtype)

    @classmethod
    def from_patches(cls, patches: PatchEmbedding, tubelet_len: int, *, method: Initialisation = "central") -> Self:
        """Starts from an image model's embedding: tubelets filled by one still image become that image's tokens.

        Args:
            patches: Trained on images; is copied, not shared.
            tubelet_len: t.
            method: "central" projects the frame t // 2 as the image and gives all others weight zero; "inflate"
                projects the mean of the frames.

        Raises:
            ArgumentError: If `patches` are no PatchEmbedding, or `tubelet_len` is not positive.
            UnknownNameError: If there is no such method.
            CombinationError: If patches overlap or have zeros around the image, which tubelets do not.
        """
        check_built_for(patches)
        if not isinstance(patches, PatchEmbedding):
            raise ArgumentError(
                f"patches must be the PatchEmbedding of an image model, whose filters tubelets inherit; got "
                f"{shown(patches)}. Pass e.g. model.patches."
            )
        if method not in get_args(Initialisation):
            raise UnknownNameError("method of initialisation", method, get_args(Initialisation))
        if patches.stride != patches.patch_size or patches.padding:
            raise CombinationError(
                f"tubelets lie side by side from the first pixel on; these patches have stride={patches.stride} and "
                f"padding={patches.padding}. Start from PatchEmbedding with stride={patches.patch_size}, padding=0."
            )
        weight = patches.projection.weight.detach()
        made = cls(
            patches.embed_dim,
            patches.patch_size,
            tubelet_len,
            in_channels=patches.in_channels,
            pad=patches.pad,
            device=weight.device,
            dtype=weight.dtype,
        )
        shares = weight.new_full((tubelet_len,), 1 / tubelet_len)
        if method == "central":
            shares = (torch.arange(tubelet_len) == tubelet_len // 2).to(weight)
        filters = weight[:, :, None] * shares[:, None, None]
        made.projection.load_state_dict({"weight": filters, "bias": patches.projection.bias})
        return made

    def forward(self, clips: Tensor) -> Tensor:
        # the same sums as the convolution, in one matrix product
        return nn.functional.linear(self._cut(clips), self.projection.weight.flatten(1), self.projection.bias)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Steps in time, rows and columns of tubelets of such a clip.

        Raises:
            ArgumentError: If tubelets do not fill it, unless `pad` is set.
        """
        require_positive_int(num_frames=num_frames, height=height, width=width)
        if not self.pad:
            reason = "which tubelets need unless TubeletEmbedding is built with pad=True"
            require_multiple_of("a clip's number of frames", num_frames, self.tubelet_len, reason)
            require_multiple_of("a clip's height", height, self.patch_size, reason)
            require_multiple_of("a clip's width", width, self.patch_size, reason)
        return -(-num_frames // self.tubelet_len), -(-height // self.patch_size), -(-width // self.patch_size)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, tubelet_len={self.tubelet_len}, pad={self.pad}"

    def _cut(self, clips: Tensor) -> Tensor:
        """The pixels of each tubelet, [B, C_in, T, H, W] -> [B, N, C_in * t * P * P], as the projection orders them."""
        check_clips(clips, self.projection.weight, "TubeletEmbedding")
        check_same_dtype("clips", clips, self.projection.weight, "TubeletEmbedding")
        sizes = (self.tubelet_len, self.patch_size, self.patch_size)
        steps, rows, columns = self.grid(*clips.shape[2:])
        after, below, right = (
            n * size - had for n, size, had in zip((steps, rows, columns), sizes, clips.shape[2:], strict=True)
        )
        x = nn.functional.pad(clips, (0, right, 0, below, 0, after)) if after or below or right else clips
        for axis, size in ((4, sizes[2]), (3, sizes[1]), (2, sizes[0])):
            x = x.unflatten(axis, (-1, size))  # at last [B, C_in, steps, t, rows, P, columns, P]
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
