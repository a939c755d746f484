"""Memory-bank attention: a causal window by segments, and one summary vector for each of many segments before it."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_not_negative, require_positive_int
from transformer_problems.core.fit import check_attention_fit, check_same_batch, check_start
from transformer_problems.core.heads import bias_of, check_input, merge_heads, rotate, split_heads
from transformer_problems.core.slots import AttentionOp, PositionBias, PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention


@dataclass(frozen=True, slots=True)
class MemoryBank:
    """Keys and values of the tokens and segment summaries that later tokens can still read.

    Args:
        tokens: Of the left context and the current segment so far, two tensors [B, H, M, D].
        summaries: Of complete segments, oldest first, two tensors [B, H, R, D].
        sums: Of the current segment's keys (before rotation) and values, two tensors [B, H, 1, D], float32 or wider.
        num_seen: Tokens seen since the beginning.
    """

    tokens: tuple[Tensor, Tensor]
    summaries: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        pairs = {"token": self.tokens, "summary": self.summaries, "sum": self.sums}
        return {f"{name}_{part}": t for name, pair in pairs.items() for part, t in zip("kv", pair, strict=True)}

    def detach(self) -> Self:
        def cut(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].detach(), pair[1].detach()

        return type(self)(cut(self.tokens), cut(self.summaries), cut(self.sums), self.num_seen)


class MemoryBankAttention(nn.Module):
    """Causal attention over a token's own segment, `left_context` tokens before it, and a bank of older summaries.

    When a segment is complete, the mean of its inputs joins the bank as one more key and value, placed at the
    segment's last token; the bank keeps the last `num_memories`. A token thus sees the last segments in full and
    num_memories * segment_len tokens in outline. All segments of a sequence are computed at once, as a batch:
    O(N * (segment_len + left_context + num_memories)); a stream holds that many keys and never more. Masked tokens
    are left out of the means.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        segment_len: Tokens in a segment.
        left_context: Tokens before a segment that its tokens see.
        num_memories: Summaries in the bank; 0 leaves segments with left context only.
        position: An encoding that acts inside attention. Default none.
        op: The attention op, given blocks, key masks and causality. Default DenseAttention.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding does not fit, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, or a size is out of range.

    Source:
        Shi et al. 2020, arXiv:2010.10759, section 3 (Emformer).
        Differs from the paper: a summary is the plain mean of a segment's inputs to this layer, where the paper
        uses the mean as a query and banks what that attends to in the layer below; tokens are causal within their
        segment, where the paper's see all of it and a right context; summaries have positions, so that any
        encoding applies to them; gradients flow through the bank.
    """

    is_causal = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_len: int,
        left_context: int,
        num_memories: int,
        position: PositionEncoding | None = None,
        op: AttentionOp | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_positive_int(segment_len=segment_len)
        require_not_negative(left_context=left_context, num_memories=num_memories)
        self.op = DenseAttention() if op is None else op
        self.position = position
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=embed_dim // num_heads, is_causal=True)
        self.embed_dim = embed_dim
        self.num_heads, self.segment_len = num_heads, segment_len
        self.left_context, self.num_memories = left_context, num_memories
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
        size = min(self.segment_len, num_tokens)
        missing, complete = -num_tokens % size, (num_tokens - 1) // size  # segments that some later one sees
        left, bank = min(self.left_context, complete * size), min(self.num_memories, complete)

        def blocks(y: Tensor, before: int) -> Tensor:
            """y [..., N, n] by segments with the tokens before them, [..., T, before + size, n], zero outside."""
            return F.pad(y, (0, 0, before, missing)).unfold(-2, before + size, size).mT

        def with_banks(summaries: Tensor, y: Tensor) -> Tensor:
            """Summaries [..., T - 1, n] that each segment sees, then its tokens, [..., T, bank + left + size, n]."""
            return torch.cat([F.pad(summaries, (0, 0, bank, 0)).unfold(-2, bank, 1).mT, blocks(y, left)], dim=-2)

        def by_segment(y: Tensor) -> Tensor:
            """y [..., N, n] by complete segments, [..., T - 1, size, n]."""
            return y[..., : complete * size, :].reshape(*y.shape[:-2], complete, size, y.shape[-1])

        q, k, v = self._project(x)
        real = x.new_ones(1, num_tokens, 1, dtype=torch.bool) if key_mask is None else key_mask[..., None]
        k_mean, v_mean = (_mean(by_segment(y), by_segment(real)[:, None]) for y in (k, v))
        summary_positions = positions[..., size - 1 :: size][..., :complete]
        k_mean = rotate(self.position, k_mean, k_mean, summary_positions, summary_positions)[1]
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        mask = with_banks(by_segment(real).any(-2), real).squeeze(-1)
        k_positions = with_banks(summary_positions[..., None], positions[..., None]).squeeze(-1)
        bias = bias_of(
            self.position, blocks(q, 0).transpose(1, 2), blocks(positions[..., None], 0).squeeze(-1), k_positions
        )
        y = self._attend(
            blocks(q_rotated, 0).transpose(1, 2),  # [B, T, H, size, D]
            with_banks(k_mean, k_rotated).transpose(1, 2),
            with_banks(v_mean, v).transpose(1, 2),
            bias,
            mask[..., None, None, :],
        )
        return y.flatten(1, 2)[:, :num_tokens]

    def initial_state(self, batch_size: int) -> MemoryBank:
        """The state before the first token: nothing to read."""
        check_start(batch_size, self.position)
        weight = self.q_proj.weight
        shape = (batch_size, self.num_heads, 0, weight.shape[0] // self.num_heads)
        none = weight.new_empty(shape)
        zero = none.sum(dim=2, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
        return MemoryBank((none, none), (none, none), (zero, zero))

    def stream(self, x: Tensor, state: MemoryBank) -> tuple[Tensor, MemoryBank]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.tokens[0]))
        if x.shape[1] == 0:
            return x, state
        first = self.segment_len - state.num_seen % self.segment_len  # tokens that the current segment still lacks
        outputs = []
        for piece in x.tensor_split(list(range(first, x.shape[1], self.segment_len)), dim=1):
            y, state = self._stream_within_segment(piece, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def extra_repr(self) -> str:
        sizes = f"segment_len={self.segment_len}, left_context={self.left_context}, num_memories={self.num_memories}"
        return f"num_heads={self.num_heads}, {sizes}"

    def _stream_within_segment(self, x: Tensor, state: MemoryBank) -> tuple[Tensor, MemoryBank]:
        """x: tokens that do not cross the end of the current segment."""
        positions = token_positions(x.shape[1], x.device, start=state.num_seen)
        q, k, v = self._project(x)
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        held, num_summaries = state.tokens[0].shape[2], state.summaries[0].shape[2]
        tokens = torch.cat([state.tokens[0], k_rotated], dim=2), torch.cat([state.tokens[1], v], dim=2)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(state.summaries, tokens, strict=True))
        done = state.num_seen // self.segment_len
        ends = token_positions(num_summaries, x.device, start=done - num_summaries + 1) * self.segment_len - 1
        recent = token_positions(held + x.shape[1], x.device, start=state.num_seen - held)
        y = self._attend(q_rotated, keys, values, bias_of(self.position, q, positions, torch.cat([ends, recent])), None)
        sum_k, sum_v = (s + new.sum(2, keepdim=True, dtype=s.dtype) for s, new in zip(state.sums, (k, v), strict=True))
        grown = MemoryBank(tokens, state.summaries, (sum_k, sum_v), state.num_seen + x.shape[1])
        return y, grown if grown.num_seen % self.segment_len else self._closed(grown)

    def _closed(self, state: MemoryBank) -> MemoryBank:
        """The state at the end of a segment, with the segment's summary in the bank."""
        k, v = ((s / self.segment_len).to(x.dtype) for s, x in zip(state.sums, state.tokens, strict=True))
        end = token_positions(1, k.device, start=state.num_seen - 1)
        new = rotate(self.position, k, k, end, end)[1], v
        bank_k, bank_v = (torch.cat(pair, dim=2) for pair in zip(state.summaries, new, strict=True))
        return MemoryBank(
            (_last(state.tokens[0], self.left_context), _last(state.tokens[1], self.left_context)),
            (_last(bank_k, self.num_memories), _last(bank_v, self.num_memories)),
            (torch.zeros_like(state.sums[0]), torch.zeros_like(state.sums[1])),
            state.num_seen,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q, k, v [B, H, N, D]."""
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None) -> Tensor:
        """Mixed and projected values, [..., n, C], for q [..., H, n, D] and k, v [..., H, m, D] that end together."""
        mixed = self.op(q, k, v, bias=bias, mask=mask, is_causal=True)
        y: Tensor = self.out_proj(merge_heads(mixed))
        return y


def _mean(y: Tensor, real: Tensor) -> Tensor:
    """Mean over the real tokens of each segment, as projections are linear also that of their inputs, projected.

    y: [B, H, T, S, D]; real: [B, 1, T, S, 1]; output: [B, H, T, D].
    """
    total = y.masked_fill(~real, 0.0).sum(-2, dtype=torch.promote_types(y.dtype, torch.float32))
    return (total / real.sum(-2).clamp(min=1)).to(y.dtype)


def _last(y: Tensor, count: int) -> Tensor:
    """The last `count` tokens of y [B, H, M, D], without holding on to the rest."""
    return y[:, :, max(0, y.shape[2] - count) :].clone()
