"""Top-k attention: each query reads its k best keys only."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.query_blocks import query_blocks
from transformer_problems.solutions.attention.scores import check_shapes, has_pairs, masked_softmax, without_pairs


class TopKAttention(nn.Module):
    """Softmax over each query's `num_keys` highest scores; every other key gets weight zero, and no gradient.

    Keys that do not compete cannot take attention away, however many they are. All N x M scores are computed, so
    time stays quadratic, but in blocks of queries of which only the chosen keys are kept, for the backward pass
    too: memory is O(N * num_keys + block_size * M). Values are summed without gathering copies of them.

    Args:
        num_keys: k, the keys that each query reads.
        block_size: Queries whose scores are held at once.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If a size is not positive, or q, k, v and mask do not fit each other.

    Source:
        Zhao et al. 2019, arXiv:1912.11637; query blocks: Gupta et al. 2021, arXiv:2106.06899.
        Differs from the papers: where keys tie for the last place, exactly num_keys stay (Zhao et al. keep all).
    """

    def __init__(self, num_keys: int, *, block_size: int = 256) -> None:
        super().__init__()
        require_positive_int(num_keys=num_keys, block_size=block_size)
        self.num_keys, self.block_size = num_keys, block_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        check_shapes(q, k, v, mask, bias)
        if not has_pairs(q, k):
            return without_pairs(q, k, v)
        outputs = []
        for scores, allowed in query_blocks(
            q, k, bias=bias, mask=mask, is_causal=is_causal, block_size=self.block_size
        ):
            if allowed is not None:
                # A sum, because masked_fill would keep its N x M mask for the backward pass.
                barred = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, float("-inf"))
                scores = scores + barred
            top, chosen = scores.topk(min(self.num_keys, scores.shape[-1]), dim=-1, sorted=False)
            weights = masked_softmax(top, None if allowed is None else top > float("-inf"))
            outputs.append(_weighted_sum(v, chosen, weights.to(v.dtype)))
        return torch.cat(outputs, dim=-2)

    def extra_repr(self) -> str:
        return f"num_keys={self.num_keys}, block_size={self.block_size}"


def _weighted_sum(v: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Values [..., G, M, D] at `chosen` [..., H, n, k], summed by `weights` [..., H, n, k]: [..., H, n, D]."""
    *lead, num_kv_heads, num_keys, head_dim = v.shape
    num_heads = chosen.shape[-3]
    heads = torch.arange(num_heads, device=v.device) // (num_heads // num_kv_heads)
    rows = torch.arange(v[..., 0, 0, 0].numel(), device=v.device).view(*lead, 1) * num_kv_heads
    first = (rows + heads) * num_keys  # where each head's values begin in the flat table
    y = nn.functional.embedding_bag(
        (chosen + first[..., None, None]).flatten(0, -2),
        v.reshape(-1, head_dim),
        per_sample_weights=weights.flatten(0, -2),
        mode="sum",
    )
    return y.view(*chosen.shape[:-1], head_dim)
