"""Entmax attention: attention weights that are exactly zero where scores are low."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import causal_mask, check_shapes, match_heads


class EntmaxAttention(nn.Module):
    """entmax(q k^T / sqrt(D) + bias) v: like softmax, but keys far enough below the best get exactly nothing.

    Softmax gives every noise token a little, and a thousand littles are much; entmax cuts them off, at a
    threshold that each row's own scores decide. The threshold is exact, found among each row's best scores in order.
    Time and memory grow as N * M.

    Args:
        alpha: 1.5, or 2 for sparsemax, which is sparser. Softmax is the limit at 1.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If alpha is neither 1.5 nor 2, or q, k, v and mask do not fit each other.

    Source:
        Martins & Astudillo 2016, arXiv:1602.02068, algorithm 1 (sparsemax); Peters et al. 2019, arXiv:1905.05702
        (1.5-entmax by sorting, and the Jacobian); in attention: Correia et al. 2019, arXiv:1909.00015.
        Differs from the papers: alpha is fixed, not learned for each head.
    """

    def __init__(self, alpha: float = 1.5) -> None:
        super().__init__()
        _check(alpha)
        self.alpha = alpha

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
        k, v = match_heads(q, k), match_heads(q, v)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [..., H, N, M]
        if bias is not None:
            scores = scores + bias.dense()
        if is_causal:
            causal = causal_mask(q.shape[-2], k.shape[-2], q.device)
            mask = causal if mask is None else mask & causal
        return entmax(scores, alpha=self.alpha, allowed=mask).to(v.dtype) @ v

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def entmax(scores: Tensor, *, alpha: float = 1.5, allowed: Tensor | None = None) -> Tensor:
    """The weights p with p_i^(alpha-1) = max(0, (alpha-1) * score_i - tau), tau such that they sum to one.

    Over the last dimension, in float32 or wider; zero where `allowed` is False, and a row without a single allowed
    key gives zeros.

    Raises:
        ArgumentError: If alpha is neither 1.5 nor 2.
    """
    _check(alpha)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if not scores.shape[-1]:
        return scores
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights: Tensor = _Entmax.apply(scores, alpha)  # type: ignore[no-untyped-call]
    return weights if allowed is None else weights.masked_fill(~allowed, 0.0)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:
        top = scores.amax(dim=-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0.0)
        # The best is now 0 and no weight exceeds 1, so tau lies in [-1, 0): what is below -1 has no part.
        z = ((alpha - 1) * (scores - top)).clamp_(min=-2.0)
        reach = (z - _threshold(z, alpha, num_best=64)).clamp_(min=0.0)
        weights = reach if alpha == 2 else reach.square_()
        ctx.alpha = alpha
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Jacobian diag(s) - s s^T / sum(s) with s = p^(2-alpha) on the support, 0 elsewhere."""
        (weights,) = ctx.saved_tensors
        s = (weights > 0).to(grad.dtype) if ctx.alpha == 2 else weights.sqrt()
        grad = grad * s
        return grad - s * (grad.sum(dim=-1, keepdim=True) / s.sum(dim=-1, keepdim=True)), None


def _threshold(z: Tensor, alpha: float, *, num_best: int) -> Tensor:
    """tau of each row, [..., 1], from its `num_best` largest entries, or from more where all of those take part."""
    num_best = min(num_best, z.shape[-1])
    best = z.topk(num_best, dim=-1).values  # in falling order
    counts = torch.arange(1, num_best + 1, dtype=z.dtype, device=z.device)
    mean = best.cumsum(dim=-1) / counts
    if alpha == 2:
        taus = mean - 1 / counts
    else:
        spread = best.square().cumsum(dim=-1) - counts * mean.square()
        taus = mean - ((1 - spread) / counts).clamp(min=0.0).sqrt()
    support = (best > taus).sum(dim=-1, keepdim=True)  # the longest beginning whose own tau admits all of it
    tau = taus.gather(-1, support - 1)
    if num_best < z.shape[-1]:
        unsolved = (support == num_best).squeeze(-1)
        if unsolved.any():
            tau[unsolved] = _threshold(z[unsolved], alpha, num_best=8 * num_best)
    return tau


def _check(alpha: float) -> None:
    if alpha not in (1.5, 2):
        raise ArgumentError(
            f"alpha must be 1.5 or 2 (sparsemax), for which entmax is exact; got {alpha:g}. "
            "Use DenseAttention for softmax, the limit at 1."
        )
