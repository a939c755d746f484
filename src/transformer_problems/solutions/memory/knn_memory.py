"""External memory: attention that also looks up the nearest of the keys it has stored."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.fit import check_attention_fit, check_same_batch, check_start
from transformer_problems.core.heads import bias_of, check_input, mask_of_keys, merge_heads, rotate, split_heads
from transformer_problems.core.slots import AttentionOp, PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention

Pairs = tuple[Tensor, Tensor]
"""Keys and values, [B, H, M, D] each."""


@dataclass(frozen=True, slots=True)
class NeighborMemory:
    """The keys and values that later tokens can still read.

    Args:
        stored: Of complete segments, oldest first, without gradients.
        own: Of the current segment so far.
        num_seen: Tokens seen since the beginning.
    """

    stored: Pairs
    own: Pairs
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        names = ("stored_keys", "stored_values", "own_keys", "own_values")
        return dict(zip(names, (*self.stored, *self.own), strict=True))

    def detach(self) -> Self:
        return type(self)(self.stored, _detached(self.own), self.num_seen)


class KNNMemoryAttention(nn.Module):
    """Causal attention within a segment, mixed with attention over the nearest of the keys stored before it.

    Segments start at multiples of `segment_len`. A complete segment's keys and values join the memory, without
    gradients, and beyond `memory_len` the oldest leave. Each query of each head finds the `num_neighbors` stored keys
    with the largest scores, attends to them alone, and a learned gate per head mixes that with the segment's own
    attention; where nothing is stored the gate is shut. Queries and keys have unit length, so that old keys do not
    drown in new ones, and a learned temperature per head stands for what their length said.

    The search is exact: every query meets every stored key, O(N * memory_len) multiplications, but only
    O(N * num_neighbors) scores are kept for the backward pass, and one segment's at a time are formed. A stream holds
    at most memory_len + segment_len keys and values.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        segment_len: Tokens in a segment.
        memory_len: Most keys and values stored.
        num_neighbors: Stored keys that one query attends to.
        position: An encoding that acts inside attention; it applies within the segment only. Default none.
        op: The segment's attention op, given causality and key masks. Default DenseAttention.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding does not fit, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, or a length is not positive.

    Source:
        Wu et al. 2022, arXiv:2203.08913, section 3. Differs from the paper: search is exact; every layer built with
        it has a memory, where the paper has one layer with; the memory of a sequence is filled within one training
        step and not carried across steps; the segment does not see the previous one but through the memory;
        the gate is shut while the memory is empty.
    """

    is_causal = True
    chooses_keys = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_len: int,
        memory_len: int,
        num_neighbors: int = 32,
        position: PositionEncoding | None = None,
        op: AttentionOp | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_positive_int(segment_len=segment_len, memory_len=memory_len, num_neighbors=num_neighbors)
        self.op = DenseAttention() if op is None else op
        self.position = position
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=self.head_dim, is_causal=True)
        self.segment_len, self.memory_len, self.num_neighbors = segment_len, memory_len, num_neighbors
        self.gradient_segment = segment_len
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        # scores of random directions then spread as those of plain attention do at its start
        self.temperature = nn.Parameter(torch.full((num_heads,), self.head_dim**0.5, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))
        self._over_neighbors = DenseAttention()

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        if positions is None:
            positions = token_positions(x.shape[1], x.device)
        q, k, v = self._project(x)

        def pairs(part: slice) -> Pairs:
            return k[:, :, part], v[:, :, part]

        def mask(part: slice) -> Tensor | None:
            return None if key_mask is None else key_mask[:, part]

        outputs = []
        for start in range(0, x.shape[1], self.segment_len):
            own, past = slice(start, start + self.segment_len), slice(max(0, start - self.memory_len), start)
            local = self._within_segment(q[:, :, own], pairs(own), positions[..., own], mask(own))
            outputs.append(self._with_memory(local, q[:, :, own], _detached(pairs(past)), mask(past)))
        return self._merge(torch.cat(outputs, dim=2))

    def initial_state(self, batch_size: int) -> NeighborMemory:
        """The state before the first token: nothing stored."""
        check_start(batch_size, self.position)
        none = self.q_proj.weight.new_empty(batch_size, self.num_heads, 0, self.head_dim)
        return NeighborMemory((none, none), (none, none))

    def stream(self, x: Tensor, state: NeighborMemory) -> tuple[Tensor, NeighborMemory]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.own[0]))
        if x.shape[1] == 0:
            return x, state
        first = self.segment_len - state.num_seen % self.segment_len  # tokens that the current segment still lacks
        outputs = []
        for piece in x.tensor_split(list(range(first, x.shape[1], self.segment_len)), dim=1):
            y, state = self._stream_within_segment(piece, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def extra_repr(self) -> str:
        sizes = f"memory_len={self.memory_len}, num_neighbors={self.num_neighbors}"
        return f"num_heads={self.num_heads}, segment_len={self.segment_len}, {sizes}"

    def _stream_within_segment(self, x: Tensor, state: NeighborMemory) -> tuple[Tensor, NeighborMemory]:
        """x: tokens that do not cross the end of the current segment."""
        q, k, v = self._project(x)
        own = torch.cat([state.own[0], k], dim=2), torch.cat([state.own[1], v], dim=2)
        num_seen = state.num_seen + x.shape[1]
        positions = token_positions(own[0].shape[2], x.device, start=num_seen - own[0].shape[2])
        y = self._with_memory(self._within_segment(q, own, positions, None), q, state.stored, None)
        if num_seen % self.segment_len:
            return self._merge(y), NeighborMemory(state.stored, own, num_seen)
        stored = self._stored(state.stored[0], own[0]), self._stored(state.stored[1], own[1])
        none = k.new_empty(*k.shape[:2], 0, k.shape[3])
        return self._merge(y), NeighborMemory(stored, (none, none), num_seen)

    def _stored(self, past: Tensor, new: Tensor) -> Tensor:
        """The last `memory_len` of past and new ones, without gradients or hold on the rest."""
        both = torch.cat([past, new.detach()], dim=2)
        return both[:, :, max(0, both.shape[2] - self.memory_len) :].clone()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q, k, v [B, H, N, D], such that an op's scores are cosine * temperature."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        scale = self.temperature[:, None, None] * self.head_dim**0.5  # ops divide by the square root of D
        return nn.functional.normalize(q, dim=-1) * scale, nn.functional.normalize(k, dim=-1), v

    def _within_segment(self, q: Tensor, own: Pairs, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of the last n tokens of a segment, [B, H, n, D], to the segment's tokens up to their own."""
        k, v = own
        q_positions = positions[..., k.shape[2] - q.shape[2] :]
        bias = bias_of(self.position, q, q_positions, positions)
        q, k = rotate(self.position, q, k, q_positions, positions)
        return self.op(q, k, v, bias=bias, mask=mask_of_keys(key_mask), is_causal=True)

    def _with_memory(self, local: Tensor, q: Tensor, stored: Pairs, key_mask: Tensor | None) -> Tensor:
        """The segment's own attention mixed with that to each query's nearest stored keys."""
        num_stored = stored[0].shape[2]
        if num_stored == 0:
            return local
        with torch.no_grad():
            scores = q @ stored[0].mT  # [B, H, n, M]
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
            best, nearest = scores.topk(min(self.num_neighbors, num_stored), dim=-1)
            allowed = best > float("-inf")
        keys, values = _gathered(stored[0], nearest), _gathered(stored[1], nearest)  # [B, H, n, K, D]
        found: Tensor = self._over_neighbors(  # each query is a batch of its own, for its keys are its own
            q[..., None, None, :], keys[..., None, :, :], values[..., None, :, :], mask=allowed[..., None, None, :]
        )[..., 0, 0, :]
        gate = self.gate.sigmoid()[:, None, None] * allowed.any(dim=-1, keepdim=True)
        return local + gate * (found - local)

    def _merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(merge_heads(y))
        return out


def _detached(pairs: Pairs) -> Pairs:
    return pairs[0].detach(), pairs[1].detach()


def _gathered(pairs: Tensor, index: Tensor) -> Tensor:
    """pairs [B, H, M, D] at index [B, H, n, K]: [B, H, n, K, D]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, pairs.shape[-1])
    gathered: Tensor = pairs.gather(2, flat).unflatten(2, index.shape[2:])
    return gathered
