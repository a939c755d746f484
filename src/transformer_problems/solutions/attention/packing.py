"""Packing: sequences of different lengths laid end to end, so that no work is spent on padding."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import AttentionOp, PositionBias
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.scores import check_shapes, key_mask_of


class PackedAttention(nn.Module):
    """Attention within each of several sequences that share one row: block-diagonal, and only the blocks computed.

    Sequences of equal length are computed as one batch by the op inside, so time and FLOPs are the sum of n^2 over
    the sequences, not B * N^2. Outside of `packed` it is the op inside.

    Args:
        op: The op that each sequence gets. Default DenseAttention.

    Shape:
        q: [1, H, N, D]; k, v: [1, G, N, D] with N the sum of the lengths; output: [1, H, N, D].

    Raises:
        ArgumentError: If the lengths do not add up to the tokens received, or q, k, v and mask do not fit each other.

    Source:
        Krell et al. 2021, arXiv:2107.02027 (attention within packed sequences).
        Differs from the paper: blocks are computed one by one, where the paper masks a dense matrix.
    """

    def __init__(self, op: AttentionOp | None = None) -> None:
        super().__init__()
        self.op = DenseAttention() if op is None else op
        self.accepts_bias = getattr(self.op, "accepts_bias", True)
        self.accepts_causal = getattr(self.op, "accepts_causal", True)
        self.lookback = getattr(self.op, "lookback", None)
        self.num_sinks = getattr(self.op, "num_sinks", 0)

    @contextmanager
    def packed(self, lengths: Tensor) -> Iterator[None]:
        """Inside, every call gets one row of sequences of these lengths, [B] int, end to end."""
        before = _lengths.set({**_lengths.get({}), self: lengths})
        try:
            yield
        finally:
            _lengths.reset(before)

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
        lengths = _lengths.get({}).get(self)
        if lengths is None:
            return self.op(q, k, v, bias=bias, mask=mask, is_causal=is_causal)
        check_shapes(q, k, v, mask, bias)
        total = int(lengths.sum())
        if q.shape[:-3].numel() != 1 or q.shape[-2] != total or k.shape[-2] != total:
            raise ArgumentError(
                f"packed sequences must be one row of {total} tokens, the sum of their lengths; got queries "
                f"{tuple(q.shape)} and keys {tuple(k.shape)}. Use pack(x, key_mask) and pass its lengths."
            )
        lead = q.shape[:-3]
        q, k, v = (x.reshape(x.shape[-3:]) for x in (q, k, v))
        key_mask = None if mask is None else key_mask_of(mask, "PackedAttention").reshape(-1)
        outputs, order = [], []
        for index in _by_length(lengths):
            y = self.op(
                *(x[:, index].transpose(0, 1) for x in (q, k, v)),  # [S, H, n, D]
                bias=None if bias is None else _bias_of(bias, index),
                mask=None if key_mask is None else key_mask[index][:, None, None, :],
                is_causal=is_causal,
            )
            outputs.append(y.transpose(0, 1).flatten(1, 2))  # [H, S*n, D]
            order.append(index.flatten())
        return torch.cat(outputs, dim=1)[:, torch.cat(order).argsort()].view(*lead, q.shape[0], total, -1)


# A context variable, no attribute: `checkpoint_layers` recomputes layers in the context of their first run.
_lengths: ContextVar[dict[PackedAttention, Tensor]] = ContextVar("_lengths")


def pack(x: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of all rows end to end, and how many each row has.

    Shape:
        x: [B, N, ...], hidden states or token numbers; key_mask: [B, N]; output: [1, total, ...] and lengths [B].
    """
    return x[key_mask][None], key_mask.sum(dim=1)


def unpack(packed: Tensor, key_mask: Tensor) -> Tensor:
    """What `pack` did undone, with zeros in place of padding. packed: [1, total, ...]; output: [B, N, ...]."""
    x = packed.new_zeros(*key_mask.shape, *packed.shape[2:])
    return x.masked_scatter(key_mask.view(*key_mask.shape, *[1] * (packed.dim() - 2)), packed)


def run_packed(model: nn.Module, tokens: Tensor, *, key_mask: Tensor) -> Tensor:
    """A model's outputs on the real tokens of a padded batch, computed without the padding; zeros elsewhere.

    Equals `model(tokens, key_mask=key_mask)` on real tokens, outputs and gradients. No layer, feed-forward and head
    included, computes what follows a row's last real token. Padding before or between real tokens is computed, and
    masked, for ops such as SlidingWindow count places: padding at the end is the one that costs nothing. Each token
    keeps the position that it has in its padded row.

    Args:
        model: Maps tokens [B, N, ...] with `key_mask` and `positions` to [B, N, ...]; all its mixers attend through
            PackedAttention.

    Shape:
        tokens: [B, N] or [B, N, C]; key_mask: [B, N]; output: [B, N, ...].

    Raises:
        CombinationError: If a mixer of the model would mix tokens of different sequences.
    """
    ops = {module for module in model.modules() if isinstance(module, PackedAttention)}
    for mixer in (module for module in model.modules() if hasattr(module, "is_causal")):
        if not ops.intersection(mixer.modules()):
            raise CombinationError(
                f"{type(mixer).__name__} would mix tokens of different sequences. "
                "Build every mixer with op=PackedAttention(...)."
            )
    kept = key_mask.flip(1).cumsum(dim=1).flip(1) > 0  # up to the last real token
    packed, lengths = pack(tokens, kept)
    real = key_mask[kept]
    places = torch.arange(key_mask.shape[1], device=key_mask.device).expand_as(key_mask)
    with ExitStack() as stack:
        for op in ops:
            stack.enter_context(op.packed(lengths))
        y = model(packed, key_mask=None if bool(real.all()) else real[None], positions=pack(places, kept)[0])
    return unpack(y[:, real], key_mask)


def _by_length(lengths: Tensor) -> Iterator[Tensor]:
    """Token indices of the sequences of each length, [S, n]."""
    starts = lengths.cumsum(dim=0) - lengths
    for length in sorted(set(lengths.tolist())):
        if length:
            yield starts[lengths == length][:, None] + torch.arange(length, device=lengths.device)


def _bias_of(bias: PositionBias, index: Tensor) -> PositionBias:
    """The bias within sequences whose tokens are at index [S, n]; S becomes a batch dimension."""
    q = bias.q.reshape(bias.q.shape[-3:])[:, index].transpose(0, 1)
    q_positions, k_positions = (p.reshape(-1)[index] for p in (bias.q_positions, bias.k_positions))
    return PositionBias(bias.encoding, q, q_positions, k_positions)
