"""Token pruning: tokens that receive little attention leave the sequence for good."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import (
    require_finite,
    require_not_negative,
    require_positive,
    require_share_or_count,
)
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.token_slots import Attended, Tokens


class TokenPruning(nn.Module):
    """Keeps the tokens that received most attention in this layer; the others leave.

    All later layers cost what the kept tokens cost. One object a layer makes a schedule:
    `[TokenPruning(keep) for keep in (0.8, 0.6, 0.4)]`.

    Args:
        keep: Tokens kept of each sequence: a share in (0, 1] of its real tokens, rounded, or a count from 1.
        num_protected: The first tokens, never pruned, such as the one that a classifier reads.

    Raises:
        ArgumentError: If keep is out of range or num_protected is negative.

    Source:
        Goyal et al. 2020, arXiv:2001.08950 (attention-based scoring, static counts per layer).
        Differs from the paper: the schedule is given, not learned by a soft-extract layer.

    Example:
        >>> import torch
        >>> from transformer_problems import Encoder, ReducingEncoder, SelfAttention, TokenPruning, WatchedAttention
        >>> encoder = Encoder(256, 64, 2, lambda: SelfAttention(64, 4, op=WatchedAttention(), is_causal=False))
        >>> shrinking = ReducingEncoder(encoder, [TokenPruning(0.5), None])
        >>> [tokens.x.shape[1] for tokens in shrinking.trace(torch.randint(256, (1, 100)))]
        [50, 50]
    """

    def __init__(self, keep: float, *, num_protected: int = 1) -> None:
        super().__init__()
        require_share_or_count("keep", keep, 1.0)
        require_not_negative(num_protected=num_protected)
        self.keep: float = keep
        self.num_protected = num_protected

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        real = tokens.real
        score = attended.received.detach().masked_fill(_protected(real, self.num_protected), float("inf"))
        order = score.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        wanted: float | Tensor = self.keep
        if isinstance(self.keep, float):
            wanted = (real.sum(dim=1, keepdim=True) * self.keep).round().clamp(min=1)
        return tokens.select(real & (rank < wanted))

    def extra_repr(self) -> str:
        return f"keep={self.keep}, num_protected={self.num_protected}"


class LearnedTokenPruning(nn.Module):
    """Tokens that received less attention than a learned threshold leave: long and noisy inputs lose more.

    In training nothing leaves; a token weighs sigmoid((received - threshold) / temperature) of what it weighed
    before, which `WatchedAttention` in later layers honours, and a token of weight near zero is as good as gone. Add
    `pruning_penalty` to the loss, or nothing pushes the threshold up. In evaluation, and after `harden`, which the
    state dict tells, tokens below the threshold leave. Received attention is about 1/N, so the threshold should start
    below that. No attention comes after the last layer, so there only the penalty would move a threshold: leave that
    layer out.

    Args:
        threshold: Where the threshold starts.
        temperature: Width of the soft step, in units of received attention.
        num_protected: The first tokens, never pruned, such as the one that a classifier reads.

    Raises:
        ArgumentError: If threshold is not finite, temperature is not positive, or num_protected is negative.

    Source:
        Kim et al. 2022, arXiv:2107.00910. Differs from the paper: the soft mask weighs a
        token's share in later attention instead of multiplying its hidden state, which the next pre-norm would undo.

    Example:
        >>> import torch
        >>> from transformer_problems import Encoder, LearnedTokenPruning, ReducingEncoder, SelfAttention
        >>> from transformer_problems import WatchedAttention
        >>> encoder = Encoder(256, 64, 2, lambda: SelfAttention(64, 4, op=WatchedAttention(), is_causal=False))
        >>> shrinking = ReducingEncoder(encoder, [LearnedTokenPruning(0.002), None])
        >>> trace = shrinking.train().trace(torch.randint(256, (1, 100)))
        >>> trace[-1].x.shape[1], bool(trace[-1].sizes.min() < 1)  # all stay while the threshold learns
        (100, True)
    """

    def __init__(
        self,
        threshold: float = 0.0,
        *,
        temperature: float = 1e-3,
        num_protected: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_finite(threshold=threshold)
        require_positive(temperature=temperature)
        require_not_negative(num_protected=num_protected)
        self.threshold = nn.Parameter(torch.tensor(float(threshold), device=device, dtype=dtype))
        self.temperature, self.num_protected = temperature, num_protected
        self.is_hard = False

    def harden(self) -> None:
        """From now on prune in training too, at the threshold as it stands: the paper's second stage."""
        self.is_hard = True
        self.threshold.requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.is_hard)  # a tensor, which every file of weights can hold

    def set_extra_state(self, state: Tensor) -> None:
        if bool(state) != self.is_hard:
            self.is_hard = bool(state)
            self.threshold.requires_grad_(not self.is_hard)

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        real = tokens.real
        protected = _protected(real, self.num_protected)
        margin = attended.received - self.threshold.to(attended.received.dtype)
        if self.is_hard or not self.training:
            return tokens.select(real & (protected | (margin >= 0)))
        weight = (margin / self.temperature).sigmoid().masked_fill(protected, 1.0)
        return replace(tokens, sizes=weight if tokens.sizes is None else tokens.sizes * weight)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, num_protected={self.num_protected}"


def pruning_penalty(trace: Sequence[Tokens]) -> Tensor:
    """Mean weight of a real token over the layers of a soft trace: the L1 term of learned pruning, in [0, 1].

    Args:
        trace: What is left after each layer, from `ReducingEncoder.trace`.

    Raises:
        ArgumentError: If the trace is empty.

    Source:
        Kim et al. 2022, arXiv:2107.00910 (the regularisation of soft masks).
    """
    if not trace:
        raise ArgumentError("trace must hold one layer or more; got none. Pass ReducingEncoder(...).trace(tokens).")
    layers = [tokens.real if tokens.sizes is None else tokens.sizes.masked_fill(~tokens.real, 0.0) for tokens in trace]
    return torch.stack([layer.sum() / tokens.real.sum() for layer, tokens in zip(layers, trace, strict=True)]).mean()


def _protected(real: Tensor, num_protected: int) -> Tensor:
    """[B, N] bool: the first real tokens of each row."""
    return real & (real.cumsum(dim=1) <= num_protected)
