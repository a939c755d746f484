"""Sliding-window attention: each token sees its neighbours only, at linear cost."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import check_shapes, has_pairs, key_mask_of, without_pairs

# Scores (batch x heads x queries x keys) whose mask or bias is formed at once: 64 MiB in float32.
_SCORES_AT_ONCE = 2**24


class SlidingWindow(nn.Module):
    """Softmax attention over the `window_size` nearest keys on each side (causal: the left side), plus the own key.

    With dilation d a query sees every d-th key, i, i - d, i - 2d, ..., so the window spans d times as far for the
    same work. Time and memory grow as N * window_size: queries are taken in blocks, each with the one stretch of
    keys that its windows cover, and every other block of the score matrix is left out.

    Args:
        window_size: Keys visible to each query on each side, not counting its own.
        dilation: Step between visible keys; a tuple gives each head its own.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D], N <= M; mask: [..., 1, 1, M]; output: [..., H, N, D].
        The queries are the last N of the M tokens, causal or not.

    Raises:
        ArgumentError: If a size is not positive, a tuple of dilations does not have H entries, there are more
            queries than keys, the mask is not a key mask, or q, k, v and mask do not fit each other.

    Source:
        Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (window and dilation per head).
        Differs from the paper: window_size counts one side, the paper's w both.
    """

    def __init__(self, window_size: int, *, dilation: int | tuple[int, ...] = 1) -> None:
        super().__init__()
        self.window_size, self.dilation = window_size, dilation
        self.lookback = lookback_of(window_size, dilation)
        self.num_heads = len(dilation) if isinstance(dilation, tuple | list) else None

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
        key_mask = None if mask is None else key_mask_of(mask, "SlidingWindow")
        return window_attention(
            q, k, v, self.window_size, dilation=self.dilation, bias=bias, key_mask=key_mask, is_causal=is_causal
        )

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, dilation={self.dilation}"


def lookback_of(window_size: int, dilation: int | tuple[int, ...]) -> int:
    """Tokens before its own that a query can see; raises ArgumentError unless every size is positive."""
    dilations = dilation if isinstance(dilation, tuple | list) else (dilation,)
    require_positive_int(window_size=window_size)
    if not dilations:
        raise ArgumentError(f"dilation must be positive, or one positive number for each head; got {dilation}.")
    for step in dilations:
        require_positive_int(dilation=step)
    return window_size * max(dilations)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    *,
    dilation: int | tuple[int, ...] = 1,
    always: Tensor | None = None,
    bias: PositionBias | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention over a window and, in the same softmax, over a few keys that every query sees.

    Args:
        window_size: Keys visible on each side, not counting the own.
        dilation: Step between visible keys, for all heads or for each.
        always: Indices of keys visible to every query, `is_causal` permitting.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; always: [S]; key_mask: [..., M]; output: [..., H, N, D].
    """
    (num_heads, num_queries), (num_kv_heads, num_keys) = q.shape[-3:-1], k.shape[-3:-1]
    require_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
    if num_queries > num_keys:
        raise ArgumentError(
            f"the number of queries must not exceed the number of keys; got {num_queries} and {num_keys}. "
            "A window stands around the query's own place, so the queries are the last of the keys' tokens."
        )
    dilations = dilation if isinstance(dilation, tuple | list) else (dilation,) * num_heads
    if len(dilations) != num_heads:
        raise ArgumentError(
            f"dilation must have one entry for each of {num_heads} heads; got {len(dilations)}. Pass one int for all."
        )
    if not has_pairs(q, k):
        return without_pairs(q, k, v)
    lead = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    outputs, order = [], []
    for step in sorted(set(dilations)):
        heads = [head for head, d in enumerate(dilations) if d == step]
        q_heads, k_heads, v_heads = q, k, v
        if len(heads) < num_heads:
            chosen = torch.tensor(heads, device=q.device)
            kv_chosen = chosen // (num_heads // num_kv_heads)
            q_heads, k_heads, v_heads = q[:, chosen], k[:, kv_chosen], v[:, kv_chosen]
        q_heads, k_heads, v_heads = (x.flatten(0, 1) for x in (q_heads, k_heads, v_heads))
        shared = None if always is None else (always, k_heads[:, always], v_heads[:, always])
        rules = _Rules(lead, heads, num_heads, window_size * step, is_causal, num_keys, shared, key_mask, bias)
        y = _dilated(q_heads, k_heads, v_heads, window_size, step, rules)
        outputs.append(y.reshape(num_queries, len(q), len(heads), -1))
        order += heads
    y = outputs[0]
    if len(outputs) > 1:
        y = torch.cat(outputs, dim=2)[:, :, torch.tensor(order, device=q.device).argsort()]
    return y.permute(1, 2, 0, 3).reshape(*lead, num_heads, num_queries, v.shape[-1])


@dataclass(frozen=True, slots=True)
class _Rules:
    """Which key a query may see and what is added to their score, asked for a few blocks at a time.

    Indices are those of the whole sequence of keys: `rows` [T, n] of queries, `columns` [T, m] of keys.
    """

    lead: torch.Size
    heads: list[int]
    num_heads: int
    reach: int
    is_causal: bool
    num_keys: int
    always: tuple[Tensor, Tensor, Tensor] | None  # indices [S], their keys and values [B*G, S, D]
    key_mask: Tensor | None
    bias: PositionBias | None

    @property
    def vary(self) -> bool:
        """Whether blocks at different places have different masks."""
        return self.always is not None or self.key_mask is not None or self.bias is not None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """T blocks of queries, each against its own keys. q: [T, B*H, n, D]; k, v: [T, B*G, m, D]; output as q."""
        visible = self._band(rows, columns)
        if self.always is not None:
            always, *shared = self.always
            k, v = (torch.cat([s.expand(len(x), -1, -1, -1), x], 2) for s, x in zip(shared, (k, v), strict=True))
            is_always = torch.zeros(self.num_keys, dtype=torch.bool, device=q.device).index_fill(0, always, True)
            columns_always = always.expand(len(columns), -1)
            visible_always = columns_always[:, None] <= (rows[..., None] if self.is_causal else self.num_keys)
            visible_always = visible_always.expand(-1, rows.shape[1], -1)
            visible = torch.cat([visible_always, visible & ~is_always[columns][:, None]], dim=-1)
            columns = torch.cat([columns_always, columns], dim=1)
        empty = None
        if self.key_mask is not None:
            visible = visible & self.key_mask[..., columns][..., None, :]
            # A row without any key is let see everything and then set to zero: no kernel meets an empty softmax.
            empty = ~visible.any(dim=-1, keepdim=True)
            visible = self._by_block(visible | empty)
        elif visible.dim() == 3:
            visible = visible[:, None]
        if self.bias is not None:
            offset = self.num_keys - self.bias.q.shape[-2]
            added = self._by_block(self.bias.blocks(rows - offset, columns), has_heads=True).to(q.dtype)
            visible = added.masked_fill(~visible, float("-inf"))
        y = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
        return y if empty is None else y.masked_fill(self._by_block(empty), 0.0)

    def _band(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[1, n, m]: the window, the same in every block, or [T, n, m] where other keys join it."""
        if self.always is None:
            rows, columns = rows[:1], columns[:1]
        distance = columns[:, None, :] - rows[:, :, None]
        return (distance >= -self.reach) & (distance <= (0 if self.is_causal else self.reach))

    def _by_block(self, x: Tensor, *, has_heads: bool = False) -> Tensor:
        """[..., T, n, m] (or [..., T, H, n, m]) as [T, B*H, n, m], or [T, 1, n, m] where all rows agree."""
        if not has_heads:
            x = x.unsqueeze(-3)
        elif x.shape[-3] > 1 and len(self.heads) < self.num_heads:
            x = x[..., self.heads, :, :]
        if x.shape[-3] == 1 and x.shape[:-4].numel() == 1:
            return x.reshape(x.shape[-4:])
        x = x.expand(*self.lead, x.shape[-4], len(self.heads), *x.shape[-2:])
        x = x.reshape(-1, *x.shape[-4:]).transpose(0, 1)
        return x.flatten(1, 2)


def _dilated(q: Tensor, k: Tensor, v: Tensor, window_size: int, step: int, rules: _Rules) -> Tensor:
    """Tokens `step` apart see each other and nobody else, so each remainder is a problem without dilation.

    q: [B*H, N, D]; k, v: [B*G, M, D]; output: [N, B*H, Dv], which is how the kernel lays it out.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    columns = torch.arange(num_keys, device=q.device)
    rows = columns[num_keys - num_queries :]
    parts, order = [], []
    for start in range(min(step, num_queries)):
        mine, theirs = slice(start, None, step), slice((num_keys - num_queries + start) % step, None, step)
        blocks = _Blocks(q[:, mine], k[:, theirs], v[:, theirs], rows[mine], columns[theirs], window_size, rules)
        parts.append(blocks.attend())
        order.append(torch.arange(start, num_queries, step, device=q.device))
    return parts[0] if step == 1 else torch.cat(parts)[torch.cat(order).argsort()]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A sequence cut where all windows are whole into equal blocks, taken in one call, and the two edges.

    Shape:
        q: [B*H, N, D]; k, v: [B*G, M, D]; rows: [N] and columns: [M], their places in the sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    columns: Tensor
    window_size: int
    rules: _Rules

    @property
    def offset(self) -> int:
        return self.k.shape[1] - self.q.shape[1]

    @property
    def after(self) -> int:
        return 0 if self.rules.is_causal else self.window_size

    def attend(self) -> Tensor:
        """Every query over its window, [N, B*H, Dv]."""
        num_queries = self.q.shape[1]
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))
        block_size = _block_size(self.window_size, copies=needs_grad or self.rules.always is not None)
        first = max(0, self.window_size - self.offset)
        num_blocks = (num_queries - first - self.after) // block_size
        if num_blocks <= 0:
            return self._edge(0, num_queries)
        last = first + num_blocks * block_size
        parts = [self._edge(0, first)] if first > 0 else []
        parts += self._interior(first, num_blocks, block_size)
        if last < num_queries:
            parts.append(self._edge(last, num_queries))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _edge(self, start: int, stop: int) -> Tensor:
        """Queries from `start` to `stop` as one block over all keys that any of them sees."""
        keys = slice(max(0, start + self.offset - self.window_size), stop + self.offset + self.after)
        q, k, v = self.q[None, :, start:stop], self.k[None, :, keys], self.v[None, :, keys]
        y = self.rules.attend(q, k, v, self.rows[None, start:stop], self.columns[None, keys])
        return y[0].transpose(0, 1)

    def _interior(self, first: int, num_blocks: int, block_size: int) -> list[Tensor]:
        """Blocks from query `first` on, some at a time; their keys are overlapping views, so nothing is copied."""
        last = first + num_blocks * block_size
        span = slice(first + self.offset - self.window_size, last + self.offset + self.after)
        length = self.window_size + block_size + self.after
        blocks = (
            self.q[:, first:last].unfold(1, block_size, block_size).transpose(0, 1).mT,  # [T, B*H, n, D]
            self.k[:, span].unfold(1, length, block_size).transpose(0, 1).mT,  # [T, B*G, m, D]
            self.v[:, span].unfold(1, length, block_size).transpose(0, 1).mT,
            self.rows[first:last].unfold(0, block_size, block_size),
            self.columns[span].unfold(0, length, block_size),
        )
        at_once = num_blocks
        if self.rules.vary:
            at_once = max(1, _SCORES_AT_ONCE // (len(self.q) * block_size * length))
        chunks = zip(*(torch.split(x, at_once) for x in blocks), strict=True)
        return [self.rules.attend(*chunk).transpose(1, 2).flatten(0, 1) for chunk in chunks]


def _block_size(window_size: int, *, copies: bool) -> int:
    """Queries taken together: the power of two at an eighth of the window, or at half of it, 32 or more.

    A block of b queries scores b + 2w keys each where 2w + 1 would do, so small blocks waste less arithmetic: at
    b = w/8 a sixteenth. Below 32, the query tile of PyTorch's CPU kernel, blocks only re-read keys more often.
    Where the (b + 2w)/b overlapping views of k and v must be written out, for their gradients or to set further
    keys beside them, larger blocks write less: 5 copies at b = w/2 instead of 17.
    """
    wanted = window_size // (2 if copies else 8)
    return max(32, 1 << (max(wanted, 1).bit_length() - 1))
