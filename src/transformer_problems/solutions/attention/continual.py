"""Continual attention: what full attention over a sliding window gives, by updates instead of recomputation."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.fit import check_attention_fit, check_same_batch, check_start, check_streams
from transformer_problems.core.heads import check_input, mask_of_keys, merge_heads, rotate, split_heads
from transformer_problems.core.slots import PositionEncoding, token_positions
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow

# A row of sums is formed anew once removals have left less than this part of the largest sum it ever held: the
# rounding errors of that sum, 2^-52 of it in float64, then stay below 2^-32 of what is left.
_SMALLEST_REMAINDER = 2.0**-20


class ContinualAttention(nn.Module):
    """The single-output form: each token attends once, on arrival, to the last `window_len` tokens.

    Outputs are final, so a step costs O(window_len * D) per head where recomputing the window costs
    O(window_len^2 * D). The whole sequence is taken by blocks, at the cost of a sliding window.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        window_len: n, tokens in the window, the newest included; 2 or more.
        position: An encoding that acts inside attention. Default none.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the position encoding does not fit, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, or the window is shorter than 2.

    Source:
        Hedegaard et al. 2022, arXiv:2201.06268, section 3.3 (single output).
        Differs from the paper: positions are those of the text, where the paper reuses those of the window in turn.
    """

    is_causal = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window_len: int,
        position: PositionEncoding | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_window(window_len)
        self.embed_dim, self.window_len = embed_dim, window_len
        op = SlidingWindow(window_len - 1)
        self.attention = SelfAttention(
            embed_dim, num_heads, op=op, position=position, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        y: Tensor = self.attention(x, key_mask=key_mask, positions=positions)
        return y

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first token: an empty cache of the window."""
        return self.attention.initial_state(batch_size)

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        return self.attention.stream(x, state)

    def extra_repr(self) -> str:
        return f"window_len={self.window_len}"


@dataclass(frozen=True, slots=True)
class RetroactiveState:
    """The tokens of the window and, for each as a query, its running sums over the keys of the window.

    Args:
        q, k, v: [B, H, n, D].
        top: The offset of each row's exponentials, [B, H, n, 1], float64 as all sums.
        total: Sum of exp(score - top), [B, H, n, 1].
        mixed: Sum of exp(score - top) * v, [B, H, n, D].
        largest: The largest `total` since the row was formed, [B, H, n, 1].
        num_seen: Tokens seen since the beginning.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    top: Tensor
    total: Tensor
    mixed: Tensor
    largest: Tensor
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        names = ("q", "k", "v", "top", "total", "mixed", "largest")
        return {name: getattr(self, name) for name in names}

    def detach(self) -> Self:
        q, k, v, top, total, mixed, largest = (t.detach() for t in self.tensors().values())
        return type(self)(q, k, v, top, total, mixed, largest, self.num_seen)


class RetroactiveAttention(nn.Module):
    """The retroactive form: each new token also updates the outputs of all tokens still in the window.

    `step` gives what full bidirectional attention over the last `window_len` tokens gives. Each token of the window
    keeps its softmax sums as a query; a step takes out the key that leaves, adds the one that comes and forms the
    sums of the newest query: O(window_len * D) per head, where recomputing costs O(window_len^2 * D). The output
    projection, window_len * C^2, is paid either way, since every output changes.

    Sums are kept in float64. A query whose sums have all but vanished, because the key that ruled them left, forms
    them anew at O(window_len * D), so that rounding errors stay far below float32's. No position bias is taken,
    only rotations.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        window_len: n, tokens in the window, the newest included; 2 or more.
        position: An encoding that rotates queries and keys. Default none.
        bias: Projections carry a bias term.

    Shape:
        x: [B, N, C] in `forward`, [B, 1, C] in `step`; output: [B, N, C], in `step` of the min(num_seen, n) tokens of
        the window, oldest first.

    Raises:
        CombinationError: If the position encoding adds a bias, or cannot be streamed.
        ArgumentError: If the heads do not divide the width, the window is shorter than 2, or a step is not one token of
            the sequences that its state has followed.

    Source:
        Hedegaard et al. 2022, arXiv:2201.06268, section 3.2 (retroactive).
        Differs from the paper: exponentials are offset and sums renewed against overflow and cancellation, and
        positions are those of the text, where the paper reuses those of the window in turn.
    """

    is_causal = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window_len: int,
        position: PositionEncoding | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_window(window_len)
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        self.op = DenseAttention()
        check_attention_fit(self.op, position, num_heads=num_heads, head_dim=embed_dim // num_heads, is_causal=False)
        check_streams(position)
        if position is not None and position.biases:
            raise CombinationError(
                f"{type(position).__name__} adds a bias to the scores, which RetroactiveAttention does not keep. "
                "Use RotaryEmbedding."
            )
        self.embed_dim, self.num_heads, self.window_len, self.position = embed_dim, num_heads, window_len, position
        self.q_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Full bidirectional attention over x, whatever its length: what `step` gives if x is the window."""
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if positions is None:
            positions = token_positions(x.shape[1], x.device)
        return self._merge(self.op(*self._project(x, positions), mask=mask_of_keys(key_mask)))

    def initial_state(self, batch_size: int) -> RetroactiveState:
        """The state before the first token: an empty window."""
        check_start(batch_size)
        weight = self.q_proj.weight
        heads = weight.new_empty(batch_size, self.num_heads, 0, weight.shape[0] // self.num_heads)
        sums = heads.double()
        column = sums[..., :1]
        return RetroactiveState(heads, heads, heads, column, column, sums, column)

    def step(self, x: Tensor, state: RetroactiveState) -> tuple[Tensor, RetroactiveState]:
        """One more token, [B, 1, C] -> outputs of the whole window, and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        if x.shape[1] != 1:
            raise ArgumentError(f"x must be one token, [B, 1, C]; got {x.shape[1]} tokens. Call step for each.")
        if not isinstance(state, RetroactiveState):
            raise ArgumentError(f"state must come from initial_state or an earlier step; got {state!r}.")
        check_same_batch(x, len(state.q))
        q, k, v = self._project(x, token_positions(1, x.device, start=state.num_seen))
        num_seen = state.num_seen + 1
        if num_seen > self.window_len:
            state = _without_oldest(state)
        if state.q.shape[2]:
            state = _with_key(state, k, v)
        keys, values = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        top, total, mixed = _sums(q, keys, values)
        state = RetroactiveState(
            torch.cat([state.q, q], dim=2),
            keys,
            values,
            torch.cat([state.top, top], dim=2),
            torch.cat([state.total, total], dim=2),
            torch.cat([state.mixed, mixed], dim=2),
            torch.cat([state.largest, total], dim=2),
            num_seen,
        )
        state = _renewed(state)
        return self._merge((state.mixed / state.total).to(v.dtype)), state

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_len={self.window_len}"

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> q, k, v [B, H, N, D], rotated."""
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.position, q, k, positions, positions)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(merge_heads(y))
        return out


def _check_window(window_len: int) -> None:
    require_positive_int(window_len=window_len)
    if window_len < 2:
        raise ArgumentError(f"window_len must be at least 2; got {window_len}. One token alone has nobody to see.")


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores in float64, [B, H, n, m]."""
    scores: Tensor = (q * q.shape[-1] ** -0.5).double() @ k.double().mT
    return scores


def _sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offset, total and mixed values of each query, from scratch."""
    scores = _scores(q, k)
    top = scores.amax(-1, keepdim=True).detach()  # any offset gives the same quotient
    weights = (scores - top).exp()
    return top, weights.sum(-1, keepdim=True), weights @ v.double()


def _without_oldest(state: RetroactiveState) -> RetroactiveState:
    """The oldest token leaves as a query, and as a key from the sums of the others."""
    q, k, v, top, total, mixed, largest = (x[:, :, 1:] for x in state.tensors().values())
    weight = (_scores(q, state.k[:, :, :1]) - top).exp()
    return RetroactiveState(
        q, k, v, top, total - weight, mixed - weight * state.v[:, :, :1].double(), largest, state.num_seen
    )


def _with_key(state: RetroactiveState, k: Tensor, v: Tensor) -> RetroactiveState:
    """The sums of all queries with one more key; the offsets rise where its score is above them."""
    score = _scores(state.q, k)
    top = torch.maximum(state.top, score.detach())
    shrink, weight = (state.top - top).exp(), (score - top).exp()
    total = state.total * shrink + weight
    mixed = state.mixed * shrink + weight * v.double()
    return replace(
        state, top=top, total=total, mixed=mixed, largest=torch.maximum(state.largest * shrink, total.detach())
    )


def _renewed(state: RetroactiveState) -> RetroactiveState:
    """The state with the sums of those queries formed anew that have lost too much to be trusted."""
    lost = state.total < _SMALLEST_REMAINDER * state.largest
    rows = lost.any(dim=1).any(dim=0).squeeze(-1).nonzero().squeeze(-1)
    if not len(rows):
        return state
    top, total, mixed = _sums(state.q[:, :, rows], state.k, state.v)
    return replace(
        state,
        top=state.top.index_copy(2, rows, top),
        total=state.total.index_copy(2, rows, total),
        mixed=state.mixed.index_copy(2, rows, mixed),
        largest=state.largest.index_copy(2, rows, total.detach()),
    )
