"""Slots: the places where a treatment replaces a part of a Transformer.

A slot is a small Protocol. Anything that satisfies it fits, from this package or not;
`transformer_problems.testing` holds the contract of each slot as runnable checks.

Shape letters: B batch, N query tokens, M key tokens, H query heads, G key/value heads, D head dim, C model width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError


class PositionEncoding(nn.Module):
    """How a model learns where a token stands: three hooks, each doing nothing unless overridden.

    Positions are explicit tensors `[N]` or `[..., N]`, so offsets, scaling, random positions and packed
    sequences need no special cases. Leading dimensions of positions are those of the hidden states or heads
    without H: `q` `[..., H, N, D]` goes with positions `[..., N]`, and a bias comes back as `[..., H, N, M]`.

    Class attributes:
        embeds: The encoding adds to the embeddings, so it belongs to the model, which calls `embed` once.
        attends: The encoding acts inside attention (`rotate`, `bias`), so it belongs to `SelfAttention`.
        biases: `bias` returns something, so the attention op must accept a bias.
        streams: False where the encoding of a token depends on the final length, so no cache can hold it.
        keeps_norms: `rotate` leaves the norms of queries and keys as they are, so that they may be normalised after it.

    Attributes `embed_dim` of one that embeds, `num_heads` and `head_dim` of one that attends say which sizes it is
    built for; without them it fits any.
    """

    embeds: bool = False
    attends: bool = False
    biases: bool = False
    streams: bool = True
    keeps_norms: bool = True

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings with positions mixed in. x: [..., N, C]; positions: [..., N]; output as x."""
        return x

    def rotate(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions. q: [..., H, N, D]; k: [..., G, M, D]."""
        return q, k

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """Term added to the scaled scores, [..., H, N, M] (H may be 1). q: [..., H, N, D] before rotation."""
        return None


class PositionBias:
    """An additive score bias that is computed only for the queries and keys an op asks for.

    The encoding may give it in any floating-point dtype. It counts to the queries' precision at least, and makes
    nothing wider than they are: of a float64 bias, float32 is what reaches queries in float32 or less, and the output
    has the queries' dtype.

    Args:
        encoding: The position encoding whose `bias` hook is asked.
        q: [..., H, N, D], before rotation.
        q_positions: [N] or [..., N].
        k_positions: [M] or [..., M].

    Raises:
        ArgumentError: When asked, if the encoding gives no floats, or on another device than the queries.
    """

    def __init__(self, encoding: PositionEncoding, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> None:
        self.encoding, self.q, self.q_positions, self.k_positions = encoding, q, q_positions, k_positions

    def dense(self) -> Tensor:
        """The whole bias, [..., H, N, M]: quadratic memory, for ops that hold all scores anyway."""
        return self._bias(self.q, self.q_positions, self.k_positions)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The bias of one rectangle of the score matrix, [..., H, rows, columns]."""
        return self._bias(self.q[..., rows, :], self.q_positions[..., rows], self.k_positions[..., columns])

    def blocks(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The bias of many blocks at once.

        Shape:
            rows: [T, n] query indices of each block; columns: [T, m] key indices of each block.
            output: [..., T, H, n, m]: blocks are a batch dimension before the heads.
        """
        q = self.q[..., rows, :].movedim(-4, -3)  # [..., H, T, n, D] -> [..., T, H, n, D]
        return self._bias(q, self.q_positions[..., rows], self.k_positions[..., columns])

    def _bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        bias = self.encoding.bias(q, q_positions, k_positions)
        assert bias is not None, "PositionBias wraps an encoding whose `biases` is False"
        if not bias.is_floating_point() or bias.device != q.device:
            raise ArgumentError(
                f"bias must be floats on {q.device}, as the queries; {type(self.encoding).__name__} gives {bias.dtype} "
                f"on {bias.device}. Convert it, or move the encoding there."
            )
        widest = torch.promote_types(q.dtype, torch.float32)
        return bias.to(widest) if torch.promote_types(bias.dtype, widest) != widest else bias


class AttentionOp(Protocol):
    """Mixes values by queries and keys; knows nothing of projections.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D] with H a multiple of G; output: [..., H, N, D].
        mask: bool, True may attend, broadcastable to [..., H, N, M]; ops that never form N x M scores take
        key masks [..., 1, 1, M] only and raise ArgumentError for others.

    With `is_causal` the queries are the last N of the M tokens: query i sees keys up to i + M - N.
    A query that may attend to nothing gets zeros; no queries (N = 0) give an empty output.

    A k of another D than q, a v of another M than k, and a q, k, v or mask on another device than the rest are refused
    with a ValueError. So are q, k and v of several dtypes, unless they are answered as if all had the widest of these;
    inside torch.autocast an op may leave them to it.

    Optional attributes, read with these defaults: `accepts_bias = True`, `accepts_causal = True`, `num_heads = None`
    and `head_dim = None`: the H and D that it is built for (None: any), and `lookback = None`: the number of keys
    before a query's own that it can ever see under `is_causal` (None: all), which lets a cache forget the rest, but for
    the first `num_sinks = 0` keys of the sequence; `ignores_norms = False`: whether only the directions of queries and
    keys count.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor: ...


class StreamingOp(AttentionOp, Protocol):
    """An attention op that needs no key/value cache because its past fits a state of its own."""

    def initial_state(self, batch_size: int) -> Any: ...

    def stream(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]: ...


def streams_itself(op: AttentionOp) -> TypeGuard[StreamingOp]:
    """Whether an op is a StreamingOp; asked for every token, so without isinstance, which is slow for protocols."""
    return hasattr(op, "initial_state")


class State(Protocol):
    """What a streaming mixer carries from chunk to chunk; never changed in place as seen from outside."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all `tensors()`; their storage may have room for as much again, and for a few tokens."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        ...

    def detach(self) -> Self:
        """The same state without its gradient history."""
        ...


class Cache(State, Protocol):
    """A state that holds the keys and values of tokens, exactly or nearly.

    Every method gives a new cache and leaves the old one as it was. Optional attributes, read with these defaults:
    `lookback = None`, the newest keys that it always keeps (None: all), and `num_sinks = 0`, the first keys that it
    keeps beside them.

    Shape:
        keys, values: [B, G, M, D] with M the tokens held; positions: [M].
    """

    @property
    def num_seen(self) -> int:
        """Tokens appended since the beginning."""
        ...

    @property
    def keys(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    def __len__(self) -> int:
        """M, the tokens held."""
        ...

    def append(self, k: Tensor, v: Tensor) -> Self:
        """The cache with n more tokens, whose queries are about to come. k, v: [B, G, n, D]."""
        ...

    def trimmed(self) -> Self:
        """The cache without what it need not keep once those queries have come."""
        ...


CacheFactory = Callable[[int], Cache]
"""Makes an empty cache for a number of sequences."""


class TokenMixer(Protocol):
    """Moves information between tokens: attention or what stands in its place.

    Shape:
        x: [B, N, C]; key_mask: [B, N] bool, True for real tokens; positions: [N] or [B, N]; output: [B, N, C].

    `is_causal` says whether token i sees only tokens up to i: decoders require True, encoders False.
    Optional attributes, read with these defaults: `embed_dim = None`, the C that it is built for, so that a model can
    refuse another; `gradient_segment = None`, the tokens in a segment, into which later segments pass no gradients
    (None: they go everywhere); `chooses_keys = False`: whether it leaves keys out by their scores, a choice that
    rounding may turn.
    """

    is_causal: bool

    def __call__(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor: ...


class StreamingMixer(TokenMixer, Protocol):
    """A token mixer that also takes its sequence in chunks.

    Chunks of any sizes, concatenated, give exactly what the mixer gives for the whole sequence.
    The state passed in stays valid, so one prefix can be continued in several ways.
    """

    def initial_state(self, batch_size: int) -> Any: ...

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]: ...


class NormFactory(Protocol):
    """Makes a norm over the last dimension, [..., C] -> [..., C], e.g. nn.LayerNorm."""

    def __call__(
        self, embed_dim: int, /, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module: ...


class Residual(Protocol):
    """How a layer joins a sublayer (attention, feed-forward network) to its input: the skip, the norm, their weights.

    Called with the input and the sublayer, both [..., C], which it calls once. Where it has a method `adopt(sublayer)`,
    that is called once with the sublayer's module when the layer is built, to scale its initial weights.
    """

    def __call__(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor: ...


class LongSkips(Protocol):
    """What each layer of a stack reads, beyond the output of the layer before it.

    Called before layer i with the i + 1 tensors so far, [..., C]: the embeddings, then each layer's output. It must
    look at each token alone, so that a stack with long skips streams as one without.
    An attribute `num_layers`, where there is one, says for how many layers it is built.
    """

    def __call__(self, history: Sequence[Tensor]) -> Tensor: ...


def token_positions(num_tokens: int, device: torch.device, *, start: int = 0) -> Tensor:
    """The default positions of a sequence: start, start + 1, ..."""
    return torch.arange(start, start + num_tokens, device=device)
