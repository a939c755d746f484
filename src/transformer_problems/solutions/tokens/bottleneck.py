"""The MobileBERT block: a wide stream between layers, narrow attention and feed-forward networks inside each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.fit import check_built_for
from transformer_problems.core.heads import check_input, mask_of_keys, merge_heads, split_heads
from transformer_problems.core.slots import AttentionOp, NormFactory
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention


class NoNorm(nn.Module):
    """x * weight + bias in place of a norm: each channel by itself, with no mean and no variance to compute.

    Shape:
        x: [..., C]; output: [..., C].

    Source:
        Sun et al. 2020, arXiv:2004.02984, section 3.3.
    """

    def __init__(
        self, embed_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embed_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(embed_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class BottleneckBlock(nn.Module):
    """norm(x + widen(y)) with y of width R made from x of width C, by attention and several feed-forward networks.

    The stream between layers stays wide, the work inside is narrow. Queries and keys share a bottleneck of their own,
    values come from the whole width. A layer has 4 C R + (3 + 2 * expansion * num_feed_forwards) R^2 weights: at the
    paper's sizes, those of the example, 0.8 million where BERT base has 7.1. It is called as TransformerBlock is, and
    sees both sides.

    Args:
        embed_dim: C, the width of the stream.
        bottleneck_dim: R, the width inside, a quarter of C in the paper.
        num_heads: H, of attention; R must be a multiple of it.
        op: The attention op. Default DenseAttention.
        num_feed_forwards: Feed-forward networks that follow each other, since one of width R is small beside attention
            that reads C.
        expansion: F / R, of each of them.
        norm: Makes the norms, after every residual and bottleneck. With nn.LayerNorm it trains more easily.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: ignored, they belong to the embeddings; output: [B, N, C].

    Raises:
        ArgumentError: If a size is not positive or the heads do not divide the bottleneck.
        CombinationError: If the op is built for other heads.

    Source:
        Sun et al. 2020, arXiv:2004.02984, sections 3.1 to 3.3 and figure 1c. Differs from the paper: no dropout, and
        no teacher, which its quality relies on.

    Example:
        >>> import torch
        >>> from transformer_problems import BottleneckBlock
        >>> block = BottleneckBlock(512, bottleneck_dim=128, num_heads=4)
        >>> block(torch.randn(2, 10, 512)).shape
        torch.Size([2, 10, 512])
    """

    is_causal = False

    def __init__(
        self,
        embed_dim: int,
        bottleneck_dim: int,
        num_heads: int,
        *,
        op: AttentionOp | None = None,
        num_feed_forwards: int = 4,
        expansion: int = 4,
        norm: NormFactory = NoNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim, num_feed_forwards=num_feed_forwards, expansion=expansion)
        require_multiple("bottleneck_dim", bottleneck_dim, "num_heads", num_heads)
        check_built_for(op, num_heads=num_heads, head_dim=bottleneck_dim // num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.op: AttentionOp = DenseAttention() if op is None else op

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, device=device, dtype=dtype)

        self.narrow = linear(embed_dim, bottleneck_dim)
        self.narrow_norm = norm(bottleneck_dim, device=device, dtype=dtype)
        self.shared = linear(embed_dim, bottleneck_dim)
        self.shared_norm = norm(bottleneck_dim, device=device, dtype=dtype)
        self.q_proj = linear(bottleneck_dim, bottleneck_dim)
        self.k_proj = linear(bottleneck_dim, bottleneck_dim)
        self.v_proj = linear(embed_dim, bottleneck_dim)
        self.out_proj = linear(bottleneck_dim, bottleneck_dim)
        self.attention_norm = norm(bottleneck_dim, device=device, dtype=dtype)
        self.ups = nn.ModuleList(linear(bottleneck_dim, expansion * bottleneck_dim) for _ in range(num_feed_forwards))
        self.downs = nn.ModuleList(linear(expansion * bottleneck_dim, bottleneck_dim) for _ in range(num_feed_forwards))
        self.norms = nn.ModuleList(norm(bottleneck_dim, device=device, dtype=dtype) for _ in range(num_feed_forwards))
        self.widen = linear(bottleneck_dim, embed_dim)
        self.final_norm = norm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        y = self.attention_norm(self.narrow_norm(self.narrow(x)) + self._attend(x, key_mask))
        for up, down, norm in zip(self.ups, self.downs, self.norms, strict=True):
            y = norm(y + down(F.relu(up(y))))
        out: Tensor = self.final_norm(x + self.widen(y))
        return out

    def _attend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, R]."""
        shared = self.shared_norm(self.shared(x))
        q, k, v = (split_heads(y, self.num_heads) for y in (self.q_proj(shared), self.k_proj(shared), self.v_proj(x)))
        y: Tensor = self.out_proj(merge_heads(self.op(q, k, v, mask=mask_of_keys(key_mask))))
        return y
