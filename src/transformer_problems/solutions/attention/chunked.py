"""Chunked attention: a token sees its own chunk and a few chunks before it, as in streaming speech recognition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import (
    require_multiple,
    require_not_negative,
    require_positive_int,
    require_whole_numbers,
)
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_attention_fit, check_start
from transformer_problems.core.heads import bias_of, check_input, merge_heads, rotate, split_heads
from transformer_problems.core.slots import AttentionOp, PositionBias, PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.kv_cache import KVCache


class ChunkedAttention(nn.Module):
    """Attention over a token's own chunk and the `left_chunks` chunks before it.

    Chunks start at multiples of chunk_size. With look-ahead a token sees all of its own chunk, so it waits for up
    to chunk_size - 1 later tokens (`max_delay`), and `is_causal` is False; without, the chunk too is causal and
    nothing waits. All chunks of a sequence are computed at once, as a batch: O(N * (left_chunks + 1) * chunk_size).

    Streaming takes chunks of any sizes without look-ahead. With look-ahead it takes whole chunks; a piece that ends
    inside a chunk is taken as the end of the stream, and continuing after it raises ArgumentError.

    `chunk_size` may be changed on a built layer, between streams. With `dynamic_chunk_sizes` every call in training
    mode draws its own from PyTorch's global generator, as nn.Dropout does, so that one model serves any latency;
    evaluation and streaming use `chunk_size`.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        chunk_size: Tokens in a chunk.
        left_chunks: Chunks before a token's own that it sees.
        look_ahead: Tokens see their whole chunk, also what comes after them.
        dynamic_chunk_sizes: Smallest and largest chunk size drawn in training, both included. Default none drawn.
        position: An encoding that acts inside attention. Default none.
        op: The attention op, given blocks, key masks and causality. Default DenseAttention.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding does not fit, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, a size is out of range, or a stream with look-ahead
            goes on after an incomplete chunk.

    Source:
        Zhang et al. 2020, arXiv:2012.05481, section 3 (chunk masks, dynamic chunk training).
        Differs from the paper: left context is a number of chunks where the paper trains with all of it; sizes are
        drawn uniformly from the given range, where the paper takes the whole utterance every other time; and each
        layer draws its own, where all layers of the paper's model share one.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        chunk_size: int,
        left_chunks: int,
        look_ahead: bool = True,
        dynamic_chunk_sizes: tuple[int, int] | None = None,
        position: PositionEncoding | None = None,
        op: AttentionOp | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_positive_int(chunk_size=chunk_size)
        require_not_negative(left_chunks=left_chunks)
        if dynamic_chunk_sizes is not None:
            _check_range(dynamic_chunk_sizes)
        self.op = DenseAttention() if op is None else op
        self.position = position
        self.is_causal = not look_ahead
        head_dim = embed_dim // num_heads
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=head_dim, is_causal=self.is_causal)
        self.embed_dim = embed_dim
        self.num_heads, self.chunk_size, self.left_chunks = num_heads, chunk_size, left_chunks
        self.dynamic_chunk_sizes = dynamic_chunk_sizes
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    @property
    def max_delay(self) -> int:
        """Later tokens that a token may have to wait for."""
        return 0 if self.is_causal else self.chunk_size - 1

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        num_tokens = x.shape[1]
        if num_tokens == 0:
            return x
        if positions is None:
            positions = token_positions(num_tokens, x.device)
        size = min(self._draw_chunk_size(), num_tokens)
        left = min(self.left_chunks, (num_tokens - 1) // size) * size
        missing = -num_tokens % size

        def blocks(y: Tensor, before: int) -> Tensor:
            """y [..., N, n] as overlapping blocks [..., T, before + size, n], zero outside the sequence."""
            return F.pad(y, (0, 0, before, missing)).unfold(-2, before + size, size).mT

        q, k, v = self._project(x)
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        exists = x.new_ones(1, num_tokens, dtype=torch.bool) if key_mask is None else key_mask
        mask = blocks(exists[..., None], left).squeeze(-1)  # [B or 1, T, left + size]
        places = positions[..., None]
        y = self._attend(
            blocks(q_rotated, 0).transpose(1, 2),  # [B, T, H, size, D]
            blocks(k_rotated, left).transpose(1, 2),
            blocks(v, left).transpose(1, 2),
            bias_of(
                self.position,
                blocks(q, 0).transpose(1, 2),
                blocks(places, 0).squeeze(-1),
                blocks(places, left).squeeze(-1),
            ),
            mask[..., None, None, :],
        )
        return y.flatten(1, 2)[:, :num_tokens]

    def initial_state(self, batch_size: int) -> KVCache:
        """The state before the first token: an empty cache."""
        check_start(batch_size, self.position)
        return KVCache.empty(batch_size, lookback=(self.left_chunks + 1) * self.chunk_size - 1)

    def stream(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x, state
        inside = state.num_seen % self.chunk_size
        if inside and not self.is_causal:
            raise ArgumentError(
                f"a stream with look-ahead must be fed multiples of chunk_size={self.chunk_size} until its end; "
                f"{state.num_seen} tokens came before this piece. Buffer the input, or pass look_ahead=False."
            )
        cuts = list(range(self.chunk_size - inside, x.shape[1], self.chunk_size))
        outputs = []
        for piece in x.tensor_split(cuts, dim=1):
            y, state = self._stream_within_chunk(piece, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def extra_repr(self) -> str:
        sizes = f"chunk_size={self.chunk_size}, left_chunks={self.left_chunks}"
        return f"num_heads={self.num_heads}, {sizes}, look_ahead={not self.is_causal}"

    def _draw_chunk_size(self) -> int:
        if self.dynamic_chunk_sizes is None or not self.training:
            return self.chunk_size
        smallest, largest = self.dynamic_chunk_sizes
        return int(torch.randint(smallest, largest + 1, (), device="cpu"))

    def _stream_within_chunk(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """x: tokens that do not cross the end of the current chunk."""
        positions = token_positions(x.shape[1], x.device, start=state.num_seen)
        first = (state.num_seen // self.chunk_size - self.left_chunks) * self.chunk_size  # the first token seen
        q, k, v = self._project(x)
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        state = state.append(k_rotated, v)
        seen = slice(max(0, first - (state.num_seen - len(state))), None)
        bias = bias_of(self.position, q, positions, state.positions[seen])
        y = self._attend(q_rotated, state.keys[:, :, seen], state.values[:, :, seen], bias, None)
        return y, state.trimmed()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q, k, v [B, H, N, D]."""
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None) -> Tensor:
        """Mixed and projected values, [..., n, C], for q [..., H, n, D] and k, v [..., H, m, D] that end together."""
        mixed = self.op(q, k, v, bias=bias, mask=mask, is_causal=self.is_causal)
        y: Tensor = self.out_proj(merge_heads(mixed))
        return y


def _check_range(sizes: tuple[int, int]) -> None:
    require_whole_numbers(dynamic_chunk_sizes=sizes)
    if len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1]:
        raise ArgumentError(
            f"dynamic_chunk_sizes must be two positive sizes in ascending order; got {sizes}. "
            "Pass (1, 25) for the paper's range."
        )
