"""The Swin Transformer: attention in shifted windows, on a grid that grows coarser from stage to stage."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int, require_whole_numbers
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_dtype_fit, check_embedding_fit
from transformer_problems.models.grid import GridBlock, GridEmbedding, GridPatches, GridStage
from transformer_problems.solutions.attention.shifted_windows import ShiftedWindowAttention
from transformer_problems.solutions.tokens.patch_merging import PatchMerging


class SwinTransformer(nn.Module):
    """Embeds an image's patches, runs stages of windowed attention, and classifies the mean of the last tokens.

    Layers of a stage are by turns plain and shifted. Between stages 2 x 2 tokens merge into one of twice the width, so
    the windows, which stay as they are, see twice as far on each side. Cost is linear in the number of pixels, and
    images of any size that the embedding takes will do: nothing but places within a window is encoded.

    With a TubeletEmbedding and windows of three axes it classifies clips [B, C_in, T, H, W]; frames do not merge.

    `device` and `dtype`, where given, are those of the whole model: parts that are passed in are converted too.

    Args:
        patches: Makes tokens of images, e.g. PatchEmbedding; says the width C of the first stage.
        window_size: Tokens along each axis of a window.
        depths: Layers of each stage; even numbers leave no plain layer without its shifted one.
        num_heads: H of each stage, whose width is C, 2 C, 4 C, ...
        num_classes: K.

    Shape:
        images: [B, C_in, *sizes]; output: logits [B, K].

    Raises:
        CombinationError: If `patches` is a class in place of an instance, or makes grids of other axes than windows.
        ArgumentError: If a size is not positive, there are not as many depths as heads, heads do not divide a width,
            `patches` makes no tokens, or an image does not fit it.

    Source:
        Liu et al. 2021, arXiv:2103.14030, sections 3.1 and 3.3; clips: Liu et al. 2021, arXiv:2106.13230, section 3.1.
        Differs from the papers: no dropout of layers (stochastic depth). As in the authors' code, a norm follows the
        embedding.

    Example:
        >>> from transformer_problems import PatchEmbedding, SwinTransformer
        >>> patches = PatchEmbedding(32, patch_size=2, pad=True)
        >>> model = SwinTransformer(patches, (4, 4), depths=(2, 2), num_heads=(2, 4), num_classes=10)
    """

    def __init__(
        self,
        patches: GridEmbedding,
        window_size: tuple[int, ...],
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_whole_numbers(window_size=window_size, depths=depths, num_heads=num_heads)
        check_embedding_fit("patches", patches, window_size)
        require_positive_int(num_classes=num_classes)
        if not depths or len(depths) != len(num_heads):
            raise ArgumentError(
                f"depths and num_heads must have an entry for each stage; got {depths} and {num_heads}. "
                "Choose e.g. depths=(2, 2), num_heads=(2, 4)."
            )
        entrance: nn.Module = GridPatches(patches, device=device, dtype=dtype)
        width = patches.embed_dim
        self.stages = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            require_positive_int(depths=depth)
            blocks = [
                GridBlock(
                    width,
                    ShiftedWindowAttention(width, heads, window_size, shifted=bool(i % 2), device=device, dtype=dtype),
                    device=device,
                    dtype=dtype,
                )
                for i in range(depth)
            ]
            self.stages.append(GridStage(entrance, blocks))
            entrance, width = PatchMerging(width, device=device, dtype=dtype), 2 * width
        self.embed_dim = width // 2
        self.norm = nn.LayerNorm(self.embed_dim, device=device, dtype=dtype)
        self.head = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)
        self.to(device=device, dtype=dtype)
        check_dtype_fit(self.head.weight, (patches,))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).flatten(1, -2).mean(dim=1))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """All tokens of the last stage after the last norm, [B, *grid, `embed_dim`]."""
        x = images
        for stage in self.stages:
            x = stage(x)
        y: Tensor = self.norm(x)
        return y
