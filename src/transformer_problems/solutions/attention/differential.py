"""Differential attention: the difference of two attention maps, in which common noise cancels."""

import math

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.fit import check_attention_fit, check_start
from transformer_problems.core.heads import bias_of, check_input, mask_of_keys, merge_heads, rotate, split_heads
from transformer_problems.core.slots import AttentionOp, PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.kv_cache import KVCache


class DifferentialAttention(nn.Module):
    """(softmax(q1 k1^T) - lambda softmax(q2 k2^T)) v: what both maps give to irrelevant tokens cancels.

    lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init, learned through four vectors that all heads of the layer
    share. Each head is brought to unit root mean square, scaled by a learned vector, then by 1 - lambda_init.
    Each map has half of a head's width, so parameters and cache are those of plain attention with `num_heads`
    heads; the values are mixed twice, so the attention products cost 1.5 times as much.

    Args:
        embed_dim: C, the model width.
        num_heads: H, pairs of maps; C must be a multiple of 2 H. Half of plain attention's heads matches the paper.
        layer_index: From 1; deeper layers start with a larger lambda, 0.8 - 0.6 exp(-0.3 (layer_index - 1)).
        num_kv_heads: G, a divisor of H. Default H.
        op: The attention op, called once a map with values twice as wide as keys. Default DenseAttention.
        position: An encoding that acts inside attention, on heads of width `head_dim` = C / (2 H). Default none.
        is_causal: Token i sees only tokens up to i.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding or causality does not fit the op.
        ArgumentError: If the heads do not divide the width, or layer_index is not positive.

    Source:
        Ye et al. 2024, arXiv:2410.05258, section 2.1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        layer_index: int = 1,
        num_kv_heads: int | None = None,
        op: AttentionOp | None = None,
        position: PositionEncoding | None = None,
        is_causal: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_multiple("embed_dim", embed_dim, "2 * num_heads", 2 * num_heads)
        require_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        require_positive_int(layer_index=layer_index)
        self.op = DenseAttention() if op is None else op
        self.position, self.is_causal = position, is_causal
        self.embed_dim, self.head_dim = embed_dim, embed_dim // (2 * num_heads)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=self.head_dim, is_causal=is_causal)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (layer_index - 1))
        kv_dim = num_kv_heads * 2 * self.head_dim
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.lambda_q = nn.Parameter(torch.randn(2, self.head_dim, device=device, dtype=dtype) * 0.1)
        self.lambda_k = nn.Parameter(torch.randn(2, self.head_dim, device=device, dtype=dtype) * 0.1)
        self.head_norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        if positions is None:
            positions = token_positions(x.shape[1], x.device)
        q, q_rotated, k, v = self._project(x, positions)
        return self._attend(q, q_rotated, k, v, positions, positions, mask_of_keys(key_mask))

    def initial_state(self, batch_size: int) -> KVCache:
        """The state before the first token: an empty cache."""
        check_start(batch_size, self.position, is_causal=self.is_causal)
        return KVCache.empty(
            batch_size, lookback=getattr(self.op, "lookback", None), num_sinks=getattr(self.op, "num_sinks", 0)
        )

    def stream(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x, state
        positions = token_positions(x.shape[1], x.device, start=state.num_seen)
        q, q_rotated, k, v = self._project(x, positions)
        state = state.append(k, v)
        y = self._attend(q, q_rotated, state.keys, state.values, positions, state.positions, None)
        return y, state.trimmed()

    def mixing(self) -> Tensor:
        """lambda, the share of the second map that is taken away, a scalar in float32 or wider."""
        q, k = (p if p.dtype == torch.float64 else p.float() for p in (self.lambda_q, self.lambda_k))
        first, second = (q * k).sum(dim=-1).exp()
        mixing: Tensor = first - second + self.lambda_init
        return mixing

    def extra_repr(self) -> str:
        kv = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"num_heads={self.num_heads}{kv}, lambda_init={self.lambda_init:.3f}, is_causal={self.is_causal}"

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q before and after rotation [B, H, N, 2D], k and v [B, G, N, 2D]; the two maps lie side by side."""
        q = split_heads(self.q_proj(x), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if self.position is None:
            return q, q, k, v
        maps = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        turned = [rotate(self.position, q_map, k_map, positions, positions) for q_map, k_map in maps]
        q_rotated, k = (torch.cat(pair, dim=-1) for pair in zip(*turned, strict=True))
        return q, q_rotated, k, v

    def _attend(
        self,
        q: Tensor,
        q_rotated: Tensor,
        k: Tensor,
        v: Tensor,
        q_positions: Tensor,
        k_positions: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """q, q_rotated: [B, H, N, 2D]; k, v: [B, G, M, 2D]; output: [B, N, C]."""
        maps = zip(q.chunk(2, dim=-1), q_rotated.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        first, second = (
            self.op(
                q_rot,
                k_map,
                v,
                bias=bias_of(self.position, q_map, q_positions, k_positions),
                mask=mask,
                is_causal=self.is_causal,
            )
            for q_map, q_rot, k_map in maps
        )
        y = self.head_norm(first - self.mixing().to(second.dtype) * second) * (1 - self.lambda_init)
        out: Tensor = self.out_proj(merge_heads(y))
        return out
