"""Softmax attention that can be watched: what each token received, and tokens that count for several."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.slots import PositionBias
from transformer_problems.core.token_slots import Attended
from transformer_problems.solutions.attention.query_blocks import query_blocks
from transformer_problems.solutions.attention.scores import check_shapes, masked_softmax, match_heads


class WatchedAttention(nn.Module):
    """Dense attention, computed in blocks of queries, that tells on request what each key received.

    Called as any op it is DenseAttention. Inside `watch` it adds up its own weights, so that knowing them costs no
    further matrix product, and weighs keys by sizes: a key of size s counts as s equal keys (log s is added to its
    scores). Time grows as N * M; memory as block_size * M, except that training keeps all weights.

    Args:
        block_size: Queries whose scores are held at once.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If block_size is not positive, or q, k, v and mask do not fit each other.

    Source:
        Received attention: Goyal et al. 2020, arXiv:2001.08950; proportional attention: Bolya et al.
        2023, arXiv:2210.09461, equation 1.
    """

    def __init__(self, *, block_size: int = 256) -> None:
        super().__init__()
        require_positive_int(block_size=block_size)
        self.block_size = block_size
        self._watcher: _Watcher | None = None

    def watch(
        self, layer: Callable[[], Tensor], *, key_mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Attended]:
        """Run a self-attention layer that calls this op once; its output, and what its attention says.

        Args:
            layer: Runs the layer.
            key_mask: True for real tokens, [B, N]: only their queries count. Default all.
            sizes: How many tokens each key counts for, [B, N]. Default one.

        Raises:
            CombinationError: If the layer does not call this op exactly once.
        """
        watcher = _Watcher(key_mask, sizes)
        self._watcher = watcher
        try:
            y = layer()
        finally:
            self._watcher = None
        if len(watcher.attended) != 1:
            raise CombinationError(
                f"a watched layer must call its WatchedAttention once; this one called it {len(watcher.attended)} "
                "times. Use SelfAttention(..., op=WatchedAttention())."
            )
        return y, watcher.attended[0]

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
        watcher, values = self._watcher, match_heads(q, v)
        outputs: list[Tensor] = []
        received: list[Tensor] = []
        for scores, allowed in query_blocks(
            q, k, bias=bias, mask=mask, is_causal=is_causal, block_size=self.block_size
        ):
            num_keys = scores.shape[-1]
            if watcher is not None and watcher.sizes is not None:
                scores = scores + watcher.log_sizes(scores.dtype)[..., None, None, :num_keys]
            weights = masked_softmax(scores, allowed)
            outputs.append(weights.to(v.dtype) @ values[..., :num_keys, :])
            if watcher is not None:
                received.append(watcher.received(weights, len(received) * self.block_size, k.shape[-2]))
        if watcher is not None:
            watcher.attended.append(Attended(torch.stack(received).sum(dim=0), k.mean(dim=-3)))
        return torch.cat(outputs, dim=-2)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"


class _Watcher:
    """What one watched call is told and what it finds out."""

    def __init__(self, key_mask: Tensor | None, sizes: Tensor | None) -> None:
        self.key_mask, self.sizes = key_mask, sizes
        self.attended: list[Attended] = []

    def log_sizes(self, dtype: torch.dtype) -> Tensor:
        """[B, M], finite where a size has underflowed to zero."""
        assert self.sizes is not None
        return self.sizes.clamp(min=torch.finfo(self.sizes.dtype).tiny).log().to(dtype)

    def received(self, weights: Tensor, start: int, num_keys: int) -> Tensor:
        """What `n` queries from `start` on give to each key, [..., M], as their part of the mean over real queries."""
        share = weights.mean(dim=-3)  # over heads, [..., n, m]
        if self.key_mask is None:
            total = share.sum(dim=-2) / num_keys
        else:
            real = self.key_mask[..., start : start + share.shape[-2], None]
            total = (share * real).sum(dim=-2) / self.key_mask.sum(dim=-1, keepdim=True).clamp(min=1)
        return nn.functional.pad(total, (0, num_keys - total.shape[-1]))
