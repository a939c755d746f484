"""Log-length scale: scores grow with the logarithm of the number of keys, which would else flatten attention."""

import math

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import AttentionOp, PositionBias, streams_itself
from transformer_problems.core.wrapped_op import WrappedOp
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.packing import PackedAttention
from transformer_problems.solutions.attention.queries import change_queries
from transformer_problems.solutions.attention.scores import check_shapes


class LogLengthScale(WrappedOp):
    """softmax(s_n q k^T / sqrt(D)) v with s_n = max(1, log n / log trained_len) and n the keys that the query sees.

    A softmax over n scores of one size gives each weight about 1/n, and its entropy grows as log n; scores that grow
    as log n keep it. Up to the trained length nothing changes, so a trained model can be given the scale afterwards.
    The queries are multiplied, before the op: so are those that a position bias reads (Shaw, Transformer-XL), while
    what does not depend on the query is added as it is (ALiBi, T5, Transformer-XL's v). Nothing is learned.

    n counts the keys that the mask allows, under `is_causal` up to the query's own, but no more than the op inside
    reaches by its `lookback` and `num_sinks`: a token's n is the same in a stream whose cache forgets as in the whole
    sequence. Without `is_causal` a window is taken to reach as far forward. What an op leaves out within its reach
    (dilation, sparse patterns, top-k) is counted all the same.

    Args:
        trained_len: Keys up to which scores stay as they are, 2 or more.
        op: The op inside, around a cache. Default DenseAttention.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: what the op inside takes; output: [..., H, N, D].

    Raises:
        ArgumentError: If trained_len is below 2, or q, k, v and mask do not fit each other.
        CombinationError: If the op inside keeps a state of its own, which hides how many tokens came before, or is
            PackedAttention, whose row of keys is many sequences: pack the scaled op instead.

    Source:
        Chiang and Cholak 2022, arXiv:2202.12172 (log n); Su 2021, kexue.fm/archives/8823 (relative to the trained
        length, from the entropy); Bai et al. 2023, arXiv:2309.16609 (on trained models, beyond their length only).
        Differs from the first two, which scale shorter inputs as well, and train so: there s_n falls below 1.
    """

    def __init__(self, trained_len: int, op: AttentionOp | None = None) -> None:
        op = DenseAttention() if op is None else op
        super().__init__(op)
        require_positive_int(trained_len=trained_len)
        if trained_len < 2:
            raise ArgumentError(f"trained_len must be 2 or more, since log 1 is 0; got {trained_len}.")
        _check_counts_keys(op)
        self.trained_len = trained_len

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
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = self._scale(_visible_keys(q, k, mask, is_causal=is_causal).to(wide), is_causal=is_causal)
        q, bias = change_queries(lambda queries: (queries * scale).to(queries.dtype), q, bias)
        return self.op(q, k, v, bias=bias, mask=mask, is_causal=is_causal)

    def extra_repr(self) -> str:
        return f"trained_len={self.trained_len}"

    def _scale(self, num_keys: Tensor, *, is_causal: bool) -> Tensor:
        """s_n, written as 1 + log(n / trained_len) / log(trained_len) so that it is exactly 1 at the trained length."""
        if self.lookback is not None:
            sides = 1 if is_causal else 2
            num_keys = num_keys.clamp(max=sides * self.lookback + 1 + self.num_sinks)
        return 1 + (num_keys / self.trained_len).clamp(min=1.0).log() / math.log(self.trained_len)


def _visible_keys(q: Tensor, k: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """How many keys each query may see, broadcastable to [..., H, N, 1]."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    first = num_keys - num_queries + 1 if is_causal else num_keys
    last = torch.arange(first, num_keys + 1, device=q.device).clamp(min=0)[:, None]  # [N, 1], or [1, 1] for all
    if mask is None:
        return last
    mask = mask[None] if mask.dim() == 1 else mask
    counts = mask.expand(*mask.shape[:-1], num_keys).cumsum(dim=-1)
    counts = nn.functional.pad(counts, (1, 0))  # [..., N or 1, M + 1]: the first so many keys hold this many allowed
    last = last[(None,) * (counts.dim() - 2)]  # take_along_dim broadcasts sizes, not ranks
    return counts.take_along_dim(last, dim=-1)


def _check_counts_keys(op: AttentionOp) -> None:
    name = type(op).__name__
    if streams_itself(op):
        raise CombinationError(
            f"{name} keeps a state of its own, which does not tell LogLengthScale how many tokens came before. "
            "Use an op that streams from a cache, such as DenseAttention or SlidingWindow."
        )
    if isinstance(op, nn.Module) and any(isinstance(module, PackedAttention) for module in op.modules()):
        raise CombinationError(
            "PackedAttention gets many sequences as one row, whose length is none of theirs. "
            "Wrap the other way: PackedAttention(LogLengthScale(...))."
        )
