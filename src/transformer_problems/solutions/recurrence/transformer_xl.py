"""Transformer-XL's segment recurrence: each segment also reads what the previous ones fed to this layer."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_not_negative, require_positive_int
from transformer_problems.core.fit import check_attention_fit, check_same_batch, check_start
from transformer_problems.core.heads import bias_of, check_input, merge_heads, rotate, split_heads
from transformer_problems.core.slots import AttentionOp, PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention


@dataclass(frozen=True, slots=True)
class SegmentMemory:
    """The layer inputs that later tokens can still read.

    Args:
        inputs: The memory of the current segment, then its tokens so far, [B, M, C].
        num_seen: Tokens seen since the beginning.
    """

    inputs: Tensor
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return self.inputs.numel() * self.inputs.element_size()

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs}

    def detach(self) -> Self:
        return type(self)(self.inputs.detach(), self.num_seen)


class TransformerXL(nn.Module):
    """Causal attention over a token's own segment and the `memory_len` layer inputs before it.

    Segments start at multiples of `segment_len`. The memory passes no gradient back. Stacked, L layers read
    L * memory_len tokens back, while a sequence costs O(N * (segment_len + memory_len)) and a stream holds at most
    segment_len + memory_len inputs a layer. All segments of a sequence are computed at once, as a batch.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        segment_len: Tokens in a segment.
        memory_len: Layer inputs before a segment that its tokens see; 0 cuts the recurrence.
        position: An encoding that acts inside attention; the paper's is TransformerXLRelative. Default none.
        op: The attention op, given blocks, key masks and causality. Default DenseAttention.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding does not fit, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, or a length is out of range.

    Source:
        Dai et al. 2019, arXiv:1901.02860, section 3.2. Differs from the paper: all segments of a sequence are
        trained in one step, so gradients reach every segment but still never cross its border through a memory.
    """

    is_causal = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_len: int,
        memory_len: int,
        position: PositionEncoding | None = None,
        op: AttentionOp | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_positive_int(segment_len=segment_len)
        require_not_negative(memory_len=memory_len)
        self.op = DenseAttention() if op is None else op
        self.position = position
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=embed_dim // num_heads, is_causal=True)
        self.embed_dim = embed_dim
        self.num_heads, self.segment_len, self.memory_len = num_heads, segment_len, memory_len
        self.gradient_segment = segment_len
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        num_tokens = x.shape[1]
        if num_tokens == 0:
            return x
        if positions is None:
            positions = token_positions(num_tokens, x.device)
        rows, columns = self._blocks(num_tokens, x.device)
        held = (columns >= 0) & (columns < num_tokens)  # [T, M+S]: false before the first token and after the last
        rows, columns = rows.clamp(max=num_tokens - 1), columns.clamp(0, num_tokens - 1)
        mask = held if key_mask is None else held & key_mask[:, columns]
        y = self._attend(
            _take(self.q_proj(x), rows),
            self._keys_or_values(self.k_proj, x, rows, columns),
            self._keys_or_values(self.v_proj, x, rows, columns),
            positions[..., rows],
            positions[..., columns],
            mask[..., None, None, :],
        )
        return y.flatten(1, 2)[:, :num_tokens]

    def initial_state(self, batch_size: int) -> SegmentMemory:
        """The state before the first token: nothing to read."""
        check_start(batch_size, self.position)
        weight = self.q_proj.weight
        return SegmentMemory(weight.new_empty(batch_size, 0, weight.shape[1]))

    def stream(self, x: Tensor, state: SegmentMemory) -> tuple[Tensor, SegmentMemory]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.inputs))
        if x.shape[1] == 0:
            return x, state
        first = self.segment_len - state.num_seen % self.segment_len  # tokens that the current segment still lacks
        outputs = []
        for piece in x.tensor_split(list(range(first, x.shape[1], self.segment_len)), dim=1):
            y, state = self._stream_within_segment(piece, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, segment_len={self.segment_len}, memory_len={self.memory_len}"

    def _blocks(self, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token indices of each segment's queries, [T, S], and of its memory and itself, [T, M+S].

        A single segment is no longer than the sequence, and no memory longer than what precedes the last segment.
        """
        size = min(self.segment_len, num_tokens)
        starts = torch.arange(0, num_tokens, size, device=device)[:, None]
        memory = min(self.memory_len, (num_tokens - 1) // size * size)
        offsets = torch.arange(-memory, size, device=device)
        return starts + offsets[memory:], starts + offsets

    def _keys_or_values(self, projection: nn.Linear, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Projected inputs of each segment's memory and itself, [B, T, M+S, C]; the memory's carry no gradient to x."""
        own = projection(x)
        old = projection(x.detach()) if x.requires_grad else own
        memory = columns[:, : columns.shape[1] - rows.shape[1]]
        return torch.cat([_take(old, memory), _take(own, rows)], dim=2)

    def _stream_within_segment(self, x: Tensor, state: SegmentMemory) -> tuple[Tensor, SegmentMemory]:
        """x: tokens that do not cross the end of the current segment."""
        held = state.inputs.shape[1]
        memory = held - state.num_seen % self.segment_len
        context = torch.cat([state.inputs[:, :memory].detach(), state.inputs[:, memory:], x], dim=1)
        positions = token_positions(context.shape[1], x.device, start=state.num_seen - held)
        y = self._attend(
            self.q_proj(x), self.k_proj(context), self.v_proj(context), positions[held:], positions, mask=None
        )
        num_seen = state.num_seen + x.shape[1]
        if num_seen % self.segment_len == 0:
            context = context[:, max(0, context.shape[1] - self.memory_len) :].detach().clone()
        return y, SegmentMemory(context, num_seen)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Mixed and projected values, [..., n, C], for q [..., n, C] and k, v [..., m, C] that end together."""
        q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))
        bias = bias_of(self.position, q, q_positions, k_positions)
        q, k = rotate(self.position, q, k, q_positions, k_positions)
        y: Tensor = self.out_proj(merge_heads(self.op(q, k, v, bias=bias, mask=mask, is_causal=True)))
        return y


def _take(y: Tensor, index: Tensor) -> Tensor:
    """y [B, N, C] at index [T, n]: [B, T, n, C]."""
    return y.index_select(1, index.flatten()).view(len(y), *index.shape, y.shape[-1])
