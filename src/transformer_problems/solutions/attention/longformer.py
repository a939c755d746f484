"""Longformer's attention: a sliding window for every token and a few tokens that see and are seen everywhere."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_whole_numbers
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_attention_fit, check_start
from transformer_problems.core.heads import bias_of, check_input, mask_of_keys, merge_heads, rotate, split_heads
from transformer_problems.core.slots import PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.solutions.attention.sliding_window import lookback_of, window_attention


class LongformerAttention(nn.Module):
    """Window attention plus global tokens, which attend to all tokens and to which all tokens attend.

    A token's softmax runs over its window and the global tokens together. A global token's runs over the whole
    sequence, with query, key and value projections of its own. Time and memory grow as N * (window + globals).

    When causal, a global token sees its own past only and is seen by every later token, however far. One at place 0
    then has a single key, so its query projection learns from later global tokens only.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        window_size: Keys visible to each token on each side (causal: to the left), not counting itself.
        dilation: Step between the window's keys; a tuple gives each head its own.
        global_tokens: Places of the global tokens in the sequence, from 0; those beyond a sequence's end are absent.
        position: An encoding that acts inside attention. Default none.
        is_causal: Token i sees only tokens up to i.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        ArgumentError: If a size is out of range, there is no global token, or one is named twice.
        CombinationError: If the position encoding does not act inside attention.

    Source:
        Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
        Differs from the paper: window_size counts one side, the paper's w both; the paper leaves causal global
        tokens undefined; global tokens are the same in every sequence of a batch.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window_size: int,
        dilation: int | tuple[int, ...] = 1,
        global_tokens: tuple[int, ...] = (0,),
        position: PositionEncoding | None = None,
        is_causal: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        self.lookback = lookback_of(window_size, dilation)
        _check(num_heads, dilation, global_tokens)
        self.global_attention = DenseAttention()
        head_dim = embed_dim // num_heads
        check_attention_fit(
            self.global_attention, position, num_heads=num_heads, head_dim=head_dim, is_causal=is_causal
        )
        self.embed_dim = embed_dim
        self.num_heads, self.window_size, self.dilation = num_heads, window_size, dilation
        self.global_tokens, self.position, self.is_causal = tuple(sorted(global_tokens)), position, is_causal

        def projection() -> Linear:
            return Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = projection(), projection(), projection()
        self.global_q_proj, self.global_k_proj, self.global_v_proj = projection(), projection(), projection()
        self.out_proj = projection()

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        places = token_positions(x.shape[1], x.device)
        positions = places if positions is None else positions
        q, k, v = (
            split_heads(self.q_proj(x), self.num_heads),
            split_heads(self.k_proj(x), self.num_heads),
            split_heads(self.v_proj(x), self.num_heads),
        )
        rows = self._indices_of_global(places)
        q_rotated, k = rotate(self.position, q, k, positions, positions)
        y = self._local(q, q_rotated, k, v, positions, rows, key_mask)
        k, v = split_heads(self.global_k_proj(x), self.num_heads), split_heads(self.global_v_proj(x), self.num_heads)
        return self._merge(self._with_global(y, x, k, v, positions, rows, key_mask))

    def initial_state(self, batch_size: int) -> "LongformerState":
        """The state before the first token."""
        check_start(batch_size, self.position, is_causal=self.is_causal)
        return LongformerState(KVCache.empty(batch_size, lookback=self.lookback), KVCache.empty(batch_size))

    def stream(self, x: Tensor, state: "LongformerState") -> tuple[Tensor, "LongformerState"]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x, state
        start, stop = state.window.num_seen, state.window.num_seen + x.shape[1]
        positions = token_positions(x.shape[1], x.device, start=start)
        q, k, v = (
            split_heads(self.q_proj(x), self.num_heads),
            split_heads(self.k_proj(x), self.num_heads),
            split_heads(self.v_proj(x), self.num_heads),
        )
        q_rotated, k = rotate(self.position, q, k, positions, positions)
        window = state.window.append(k, v)
        keys, values = state.with_left(window)
        left = torch.tensor(self.global_tokens[: state.num_left], dtype=torch.long, device=x.device)
        k_positions = torch.cat([left, window.positions])
        always = self._indices_of_global(k_positions)
        y = self._local(q, q_rotated, keys, values, k_positions, always, None)
        past = state.past
        if start <= self.global_tokens[-1]:  # a global token, here or to come, sees all that came before it
            past = past.append(
                split_heads(self.global_k_proj(x), self.num_heads), split_heads(self.global_v_proj(x), self.num_heads)
            )
            rows = self._indices_of_global(positions)
            y = self._with_global(y, x, past.keys, past.values, past.positions, rows, None)
        if stop > self.global_tokens[-1]:
            past = KVCache.empty(x.shape[0])
        trimmed = window.trimmed()
        leaving = always[always < len(k_positions) - len(trimmed)]
        return self._merge(y), LongformerState(trimmed, past, keys[:, :, leaving], values[:, :, leaving])

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, dilation={self.dilation}, "
            f"global_tokens={self.global_tokens}, is_causal={self.is_causal}"
        )

    def _local(
        self,
        q: Tensor,
        q_rotated: Tensor,
        k: Tensor,
        v: Tensor,
        k_positions: Tensor,
        always: Tensor,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Every token over its window and the keys at `always`, [B, H, N, D]."""
        return window_attention(
            q_rotated,
            k,
            v,
            self.window_size,
            dilation=self.dilation,
            always=always,
            bias=bias_of(self.position, q, k_positions[..., -q.shape[-2] :], k_positions),
            key_mask=key_mask,
            is_causal=self.is_causal,
        )

    def _with_global(
        self,
        y: Tensor,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        k_positions: Tensor,
        rows: Tensor,
        key_mask: Tensor | None,
    ) -> Tensor:
        """`y` with its `rows` replaced by attention over all of `k`, whose last tokens are those of `x`."""
        places = rows + k.shape[-2] - x.shape[1]
        mask = mask_of_keys(key_mask)
        if self.is_causal:
            causal = token_positions(k.shape[-2], x.device) <= places[:, None]
            mask = causal if mask is None else mask & causal
        q = split_heads(self.global_q_proj(x[:, rows]), self.num_heads)
        q_positions = k_positions[..., places]
        bias = bias_of(self.position, q, q_positions, k_positions)
        q, k = rotate(self.position, q, k, q_positions, k_positions)
        return y.index_copy(-2, rows, self.global_attention(q, k, v, bias=bias, mask=mask))

    def _indices_of_global(self, places: Tensor) -> Tensor:
        """Where in `places` the global tokens stand, in order."""
        return torch.isin(places, torch.tensor(self.global_tokens, device=places.device)).nonzero().squeeze(-1)

    def _merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(merge_heads(y))
        return out


@dataclass(frozen=True, slots=True)
class LongformerState:
    """What later tokens may still see: the window, global tokens that left it, and, until the last global token
    has come, the keys and values that global tokens attend to.

    Shape:
        left_keys, left_values: [B, H, num_left, D].
    """

    window: KVCache
    past: KVCache
    left_keys: Tensor | None = None
    left_values: Tensor | None = None

    @property
    def num_left(self) -> int:
        return 0 if self.left_keys is None else self.left_keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        held = {f"window_{name}": x for name, x in self.window.tensors().items()}
        held |= {f"past_{name}": x for name, x in self.past.tensors().items()}
        if self.left_keys is not None and self.left_values is not None:
            held |= {"left_keys": self.left_keys, "left_values": self.left_values}
        return held

    def detach(self) -> Self:
        left = [None if x is None else x.detach() for x in (self.left_keys, self.left_values)]
        return type(self)(self.window.detach(), self.past.detach(), *left)

    def with_left(self, window: KVCache) -> tuple[Tensor, Tensor]:
        """Keys and values of the global tokens that left the window, then those of `window`."""
        if self.left_keys is None or self.left_values is None:
            return window.keys, window.values
        return torch.cat([self.left_keys, window.keys], 2), torch.cat([self.left_values, window.values], 2)


def _check(num_heads: int, dilation: int | tuple[int, ...], global_tokens: tuple[int, ...]) -> None:
    if isinstance(dilation, tuple | list) and len(dilation) != num_heads:
        raise ArgumentError(
            f"dilation must have one entry for each of {num_heads} heads; got {len(dilation)}. Pass one int for all."
        )
    require_whole_numbers(global_tokens=global_tokens)
    if not global_tokens or min(global_tokens) < 0 or len(set(global_tokens)) < len(global_tokens):
        raise ArgumentError(
            f"global_tokens must be distinct places from 0 on, at least one; got {global_tokens}. "
            "For none use SelfAttention(op=SlidingWindow(...))."
        )
