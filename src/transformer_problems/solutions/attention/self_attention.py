"""The attention layer: projections around a position encoding and an attention op."""

from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.fit import check_attention_fit, check_cache_fit, check_start
from transformer_problems.core.heads import bias_of, check_input, mask_of_keys, merge_heads, rotate, split_heads
from transformer_problems.core.slots import (
    AttentionOp,
    CacheFactory,
    PositionEncoding,
    streams_itself,
    token_positions,
)
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.kv_cache import KVCache


class SelfAttention(nn.Module):
    """Multi-head self-attention whose op and position encoding are injected.

    Streaming keeps the keys and values of the past in a cache, or in the op's own state where the op has one
    (`StreamingOp`); either way chunks of any sizes give what the whole sequence gives.

    Args:
        embed_dim: C, the model width.
        num_heads: H, query heads; C must be a multiple of it.
        num_kv_heads: G, key/value heads, a divisor of H; fewer than H is grouped-query attention. Default H.
        op: The attention op. Default FlashAttention.
        position: An encoding that acts inside attention (rotary, ALiBi, relative). Default none.
        is_causal: Token i sees only tokens up to i.
        bias: Projections carry a bias term.
        cache: Makes the cache for a number of sequences. Default a KVCache that keeps what the op looks back on.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding, causality or the cache does not fit the op.
        ArgumentError: If the heads do not divide the width.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        op: AttentionOp | None = None,
        position: PositionEncoding | None = None,
        is_causal: bool = True,
        bias: bool = False,
        cache: CacheFactory | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        self.op: AttentionOp = FlashAttention() if op is None else op
        self.position = position
        self.is_causal = is_causal
        self.embed_dim, self.head_dim = embed_dim, embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=self.head_dim, is_causal=is_causal)
        if cache is not None and streams_itself(self.op):
            raise CombinationError(
                f"{type(self.op).__name__} keeps a state of its own and would never use a cache. Pass cache=None."
            )
        self.cache = cache
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.qkv_proj: nn.Module | None = None  # where it is set, it answers for all three, in this order
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        if positions is None:
            positions = token_positions(x.shape[1], x.device)
        q, k, v = self._project(x)
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        y = self.op(
            q_rotated,
            k_rotated,
            v,
            bias=bias_of(self.position, q, positions, positions),
            mask=mask_of_keys(key_mask),
            is_causal=self.is_causal,
        )
        out: Tensor = self.out_proj(merge_heads(y))
        return out

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first token: an empty cache, or the op's own."""
        check_start(batch_size, self.position, is_causal=self.is_causal)
        if streams_itself(self.op):
            return self.op.initial_state(batch_size)
        if self.cache is not None:
            cache = self.cache(batch_size)
            check_cache_fit(self.op, cache)
            return cache
        return KVCache.empty(
            batch_size, lookback=getattr(self.op, "lookback", None), num_sinks=getattr(self.op, "num_sinks", 0)
        )

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        if state is None:
            raise ArgumentError("state must come from initial_state or an earlier stream; got None.")
        if x.shape[1] == 0:
            return x, state
        positions = token_positions(x.shape[1], x.device, start=state.num_seen)
        q, k, v = self._project(x)
        q_rotated, k_rotated = rotate(self.position, q, k, positions, positions)
        if streams_itself(self.op):
            y, state = self.op.stream(q_rotated, k_rotated, v, state)
            return self.out_proj(merge_heads(y)), state
        state = state.append(k_rotated, v)
        biases = self.position is not None and self.position.biases  # otherwise the positions held need not be told
        bias = bias_of(self.position, q, positions, state.positions) if biases else None
        y = self.op(q_rotated, state.keys, state.values, bias=bias, is_causal=True)
        return self.out_proj(merge_heads(y)), state.trimmed()

    def extra_repr(self) -> str:
        kv = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"num_heads={self.num_heads}{kv}, is_causal={self.is_causal}"

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q [B, H, N, D]; k, v [B, G, N, D]."""
        if self.qkv_proj is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            kv_dim = self.num_kv_heads * self.head_dim
            q, k, v = self.qkv_proj(x).split([self.num_heads * self.head_dim, kv_dim, kv_dim], dim=-1)
        return (
            split_heads(q, self.num_heads),
            split_heads(k, self.num_kv_heads),
            split_heads(v, self.num_kv_heads),
        )
