"""Sparse Transformer attention: near tokens in full, far ones by every stride-th, at cost N * sqrt(N)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import (
    check_shapes,
    has_pairs,
    key_mask_of,
    masked_softmax,
    match_heads,
    without_pairs,
)

Pattern = Literal["strided", "fixed"]


class SparseAttention(nn.Module):
    """Softmax attention over a near part and a thin far part of the sequence, each token reaching all in two layers.

    With stride l, token i sees, up to itself where causal:
      strided: the tokens at most l away, and its column: those a multiple of l away. For data with a period, such
      as rows of pixels.
      fixed: its own block of l tokens, and the last `num_summary` tokens of every other block. For text.

    Both parts share one softmax and are computed by blocks: N * (3l + N/l) scores for "strided", where N/l tends
    to the power 1.5 of N at l = sqrt(N); N * (l + num_summary * N/l) for "fixed". A cached decoding step
    works on a whole block of l queries.

    Args:
        stride: l, in tokens; near sqrt(N) costs least.
        pattern: Which tokens are far ones; see above.
        num_summary: Summary tokens at the end of each block, the paper's c; for "fixed" only. Default 8, the
            paper's lower end, or `stride` where that is smaller.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D], N <= M; mask: [..., 1, 1, M]; output: [..., H, N, D].
        The queries are the last N of the M tokens, causal or not.

    Raises:
        ArgumentError: If a size is out of range, num_summary is given for "strided", there are more queries than
            keys, the mask is not a key mask, or q, k, v and mask do not fit each other.
        UnknownNameError: If the pattern is neither "strided" nor "fixed".

    Source:
        Child et al. 2019, arXiv:1904.10509, section 4.
        Differs from the paper: each head sees the union of both parts (section 5.2, its second way to combine
        them); the form that is not causal, which mirrors the pattern to the right, is ours.
    """

    def __init__(self, stride: int, *, pattern: Pattern = "strided", num_summary: int | None = None) -> None:
        super().__init__()
        require_positive_int(stride=stride)
        if pattern not in get_args(Pattern):
            raise UnknownNameError("pattern", pattern, get_args(Pattern))
        if pattern == "strided" and num_summary is not None:
            raise ArgumentError(
                f'num_summary belongs to pattern "fixed"; got {num_summary} with "strided". Leave it out.'
            )
        self.stride, self.pattern = stride, pattern
        self.num_summary = min(8, stride) if num_summary is None else num_summary
        require_positive_int(num_summary=self.num_summary)
        if self.num_summary > stride:
            raise ArgumentError(
                f"num_summary must be from 1 to stride; got {num_summary} with stride {stride}. "
                "It counts tokens inside each block."
            )

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
        num_queries, num_keys = q.shape[-2], k.shape[-2]
        if num_queries > num_keys:
            raise ArgumentError(
                f"the number of queries must not exceed the number of keys; got {num_queries} and {num_keys}. "
                "The pattern stands around the query's own place, so the queries are the last of the keys' tokens."
            )
        if not has_pairs(q, k):
            return without_pairs(q, k, v)
        key_mask = None if mask is None else key_mask_of(mask, "SparseAttention")
        scores = _Scores(num_queries, num_keys, is_causal, key_mask, bias)
        k, v = match_heads(q, k), match_heads(q, v)
        # Blocks are counted from the first key; the first query may stand inside one.
        before, after = scores.offset % self.stride, -num_keys % self.stride
        q = pad(q * q.shape[-1] ** -0.5, (0, 0, before, after))
        k, v = pad(k, (0, 0, 0, after)), pad(v, (0, 0, 0, after))
        rows = torch.arange(scores.offset - before, num_keys + after, device=q.device)
        columns = torch.arange(num_keys + after, device=q.device)
        attend = self._strided if self.pattern == "strided" else self._fixed
        y = attend(q, k, v, rows, columns, scores, is_causal)
        return y[..., before : before + num_queries, :]

    def extra_repr(self) -> str:
        summary = f", num_summary={self.num_summary}" if self.pattern == "fixed" else ""
        return f"stride={self.stride}, pattern={self.pattern!r}{summary}"

    def _strided(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scores: "_Scores", is_causal: bool
    ) -> Tensor:
        """The block of each query with its neighbours, then the query's column."""
        stride = self.stride
        first = len(columns) - len(rows)
        right = 0 if is_causal else stride  # keys of block t: those of blocks t - 1, t and, unless causal, t + 1
        width = 2 * stride + right
        k_near, v_near = (pad(x, (0, 0, stride, right))[..., first:, :].unfold(-2, width, stride).mT for x in (k, v))
        near_columns = pad(columns, (stride, right), value=-1)[first:].unfold(0, width, stride)
        q_near, near_rows = _cut(q, stride), rows.view(-1, stride)
        near, near_visible = scores.of_blocks(q_near, k_near, near_rows, near_columns)
        near_visible = near_visible & (scores.distance(near_rows, near_columns).abs() <= stride)

        # Tokens with one remainder by the stride are a column: [..., l, number of blocks, D].
        q_far, k_far, v_far = (_cut(x, stride).transpose(-3, -2) for x in (q, k, v))
        far_rows, far_columns = rows.view(-1, stride).T, columns.view(-1, stride).T
        far, far_visible = scores.of_blocks(q_far, k_far, far_rows, far_columns)
        far_visible = far_visible & (scores.distance(far_rows, far_columns).abs() > stride)

        weights = _joint_softmax(
            [near, far.transpose(-3, -2)], [near_visible, far_visible.transpose(-3, -2)], dtype=v.dtype
        )
        y = weights[0] @ v_near + (weights[1].transpose(-3, -2) @ v_far).transpose(-3, -2)
        return y.flatten(-3, -2)

    def _fixed(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scores: "_Scores", is_causal: bool
    ) -> Tensor:
        """The query's own block, then the summary tokens of the others."""
        stride = self.stride
        blocks = rows.view(-1, stride)
        k_near, v_near = (_cut(x[..., int(rows[0]) :, :], stride) for x in (k, v))
        near, near_visible = scores.of_blocks(_cut(q, stride), k_near, blocks, blocks)

        # The summary tokens are the same for every query, so all queries are one block.
        summary = columns.view(-1, stride)[:, -self.num_summary :].flatten()
        k_far, v_far = k[..., None, summary, :], v[..., None, summary, :]
        far, far_visible = scores.of_blocks(q.unsqueeze(-3), k_far, rows[None], summary[None])
        far_visible = far_visible & (rows[:, None] // stride != summary // stride)
        far, far_visible = (_cut(x.squeeze(-3), stride) for x in (far, far_visible))

        weights = _joint_softmax([near, far], [near_visible, far_visible], dtype=v.dtype)
        return (weights[0] @ v_near + weights[1] @ v_far).flatten(-3, -2)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores and visibility of blocks by the indices of their tokens; indices outside 0 ... M - 1 are padding."""

    num_queries: int
    num_keys: int
    is_causal: bool
    key_mask: Tensor | None
    bias: PositionBias | None

    @property
    def offset(self) -> int:
        """The first query's place among the keys."""
        return self.num_keys - self.num_queries

    @staticmethod
    def distance(rows: Tensor, columns: Tensor) -> Tensor:
        """How far each key stands behind each query, [T, n, m]."""
        return rows[..., None] - columns[..., None, :]

    def of_blocks(self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [..., H, T, n, m], and which of them count, broadcastable to them.

        q: [..., H, T, n, D], scaled; k: [..., H, T, m, D]; rows: [T, n]; columns: [T, m].
        """
        scores = q @ k.mT
        held = columns.clamp(0, self.num_keys - 1)
        visible = ((columns >= 0) & (columns < self.num_keys))[:, None]
        if self.is_causal:
            visible = visible & (self.distance(rows, columns) >= 0)
        visible = visible.expand(-1, rows.shape[-1], -1)
        if self.key_mask is not None:
            visible = visible & self.key_mask[..., held][..., None, :, None, :]
        if self.bias is not None:
            asked = (rows - self.offset).clamp(0, self.num_queries - 1)
            scores = scores + self.bias.blocks(asked, held).transpose(-4, -3).to(scores.dtype)
        return scores, visible


def _cut(x: Tensor, size: int) -> Tensor:
    """[..., N, D] as blocks of tokens, [..., N / size, size, D]."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _joint_softmax(scores: list[Tensor], visible: list[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
    """One softmax over the last dimensions of all parts together, cut back into the parts."""
    allowed = [see.expand(*see.shape[:-3], *part.shape[-3:]) for part, see in zip(scores, visible, strict=True)]
    weights = masked_softmax(torch.cat(scores, dim=-1), torch.cat(allowed, dim=-1)).to(dtype)
    return list(torch.split(weights, [part.shape[-1] for part in scores], dim=-1))
