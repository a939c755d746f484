"""How well a model predicts."""

import math

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError


def bits_per_byte(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean over an example's tokens of -log2 p(target), one figure an example.

    With bytes as tokens this is bits per byte: 8 for a uniform guess, lower is better. Logits are normalised
    and averaged in float32, or in float64 if they come so.

    Args:
        mask: True for the tokens that count. Default all.

    Shape:
        logits: [..., N, V]; targets: [..., N] int; mask: broadcastable to [..., N] bool; output: [...].

    Raises:
        ArgumentError: If shapes do not match, or an example has no token that counts.
    """
    if logits.shape[:-1] != targets.shape:
        raise ArgumentError(
            f"targets must have the shape of logits without the vocabulary, {tuple(logits.shape[:-1])}; "
            f"got {tuple(targets.shape)}. Pass one target a position."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = logits.log_softmax(dim=-1).gather(-1, targets[..., None].long()).squeeze(-1)
    bits = log_probabilities / -math.log(2)  # [..., N]
    if mask is None:
        return bits.mean(dim=-1)
    mask = mask.expand_as(bits)
    counts = mask.sum(dim=-1)
    if not counts.all():
        raise ArgumentError("mask must leave at least one token in every example; got one with none. Drop it.")
    return bits.masked_fill(~mask, 0.0).sum(dim=-1) / counts
