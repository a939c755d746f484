"""A classifier of sequences of features, such as those of recorded sound."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_built_for, check_dtype_fit, check_makes_layers
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.inputs import check_floating, check_same_dtype, shown
from transformer_problems.core.slots import token_positions
from transformer_problems.models.stack import TransformerLayers

BlockFactory = Callable[[], nn.Module]
"""Makes one layer, called as TransformerBlock is."""


class ConformerEncoder(nn.Module):
    """Projects each frame's features, runs the blocks, and classifies the mean of the real frames.

    The blocks are injected, so that a plain Transformer with the same ends is its baseline: pass what makes a
    ConformerBlock, or what makes a TransformerBlock. A layer norm follows the last block, for those that end in none.

    `device` and `dtype`, where given, are those of the whole model: parts that are passed in are converted too.

    Args:
        num_features: F, features of a frame.
        embed_dim: C, the width of the blocks.
        num_layers: L.
        num_classes: K.
        block: Called once a layer; returns that layer's block, of width C, whose mixer knows positions: nothing else
            adds them.

    Shape:
        features: [B, N, F]; key_mask: [B, N] bool, True for real frames; output: [B, K] logits.

    Raises:
        ArgumentError: If a size is not positive, `block` is a block in place of what makes one or makes none, or an
            input's shape or dtype is wrong.
        CombinationError: If a block is a class, or built for another width or dtype.

    Source:
        Gulati et al. 2020, arXiv:2005.08100, figure 1. Differs from the paper: a linear projection stands in place of
        its convolutional subsampling, and pooling with a linear head in place of its transducer.

    Example:
        >>> import torch
        >>> from transformer_problems import ConformerBlock, ConformerEncoder, SelfAttention
        >>> def block():
        ...     return ConformerBlock(64, SelfAttention(64, num_heads=4, is_causal=False), kernel_size=15)
        >>> model = ConformerEncoder(40, 64, num_layers=2, num_classes=10, block=block)
        >>> model(torch.randn(8, 100, 40)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        num_features: int,
        embed_dim: int,
        num_layers: int,
        num_classes: int,
        block: BlockFactory,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(
            num_features=num_features, embed_dim=embed_dim, num_layers=num_layers, num_classes=num_classes
        )
        check_makes_layers("block", block, "a layer")
        self.num_features = num_features
        self.projection = nn.Linear(num_features, embed_dim, device=device, dtype=dtype)
        blocks = [block() for _ in range(num_layers)]
        for made in blocks:
            check_built_for(made, embed_dim=embed_dim)
            if not isinstance(made, nn.Module):
                raise ArgumentError(
                    f"block must make a module; it made {shown(made)}. Pass e.g. block=lambda: "
                    f"ConformerBlock({embed_dim}, mixer)."
                )
        self.blocks = TransformerLayers(blocks)
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.head = nn.Linear(embed_dim, num_classes, device=device, dtype=dtype)
        self.to(device=device, dtype=dtype)
        check_dtype_fit(self.head.weight, blocks)

    def forward(self, features: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        check_floating("features", features)
        if features.dim() != 3 or features.shape[-1] != self.num_features or features.shape[1] == 0:
            raise ArgumentError(
                f"features must be [B, N, {self.num_features}] of one frame or more; got {list(features.shape)}. "
                "Give one sequence as features[None]."
            )
        check_same_dtype("features", features, self.norm.weight, "ConformerEncoder")
        check_key_mask(key_mask, features)
        positions = token_positions(features.shape[1], features.device)
        x = self.blocks(self.projection(features), key_mask=key_mask, positions=positions)
        y: Tensor = self.head(_mean_of_real(self.norm(x), key_mask))
        return y


def _mean_of_real(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """[B, N, C] -> [B, C]; zeros for a sequence without real frames."""
    if key_mask is None:
        return x.mean(dim=1)
    total = x.masked_fill(~key_mask[..., None], 0.0).sum(dim=1)
    return total / key_mask.sum(dim=1, keepdim=True).clamp(min=1)
