"""Attention as a graph from the answer's position down to the tokens."""

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.interpretability.attribution import Case, widened


def head_means(case: Case) -> list[Tensor]:
    """Attention weights of each layer from the first on, averaged over its heads, [B, N, N].

    Raises:
        CombinationError: If the model gives none.
        ArgumentError: If they are of another form or not finite.
    """
    attentions = case.model.attentions(case.tokens, key_mask=case.key_mask)
    if not attentions:
        raise CombinationError(
            "a model must have attention weights to be explained by them; this one has none. Use a gradient method "
            "such as GradientXInput."
        )
    num_sequences, num_tokens = case.tokens.shape
    for weights in attentions:
        if weights.dim() != 4 or (weights.shape[0], *weights.shape[2:]) != (num_sequences, num_tokens, num_tokens):
            raise ArgumentError(
                f"attention weights must be [{num_sequences}, H, {num_tokens}, {num_tokens}]; got "
                f"{list(weights.shape)}. Use a model whose layers keep all tokens."
            )
        if not bool(weights.isfinite().all()):
            raise ArgumentError("attention weights must be finite; got NaN or infinity. Use float32.")
    return [widened(weights).mean(dim=1) for weights in attentions]


def mixing_matrices(case: Case) -> list[Tensor]:
    """0.5 A + 0.5 I of each layer, the half for the skip around it, with rows that sum to one, [B, N, N].

    Raises:
        CombinationError: If weights are negative, which shares cannot be.
    """
    mixed = []
    for weights in head_means(case):
        if float(weights.min()) < 0:
            raise CombinationError(
                f"attention weights must not be negative to be shares; got {float(weights.min()):.3g}. Use "
                "LastAttention, or a gradient method such as GradientXInput."
            )
        layer = 0.5 * weights + 0.5 * torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        mixed.append(layer / layer.sum(dim=-1, keepdim=True))
    return mixed


def reading_of(case: Case) -> Tensor:
    """Which positions of the last layer the answer is read at, shares [B, N]."""
    return widened(case.model.reading(case.tokens, key_mask=case.key_mask))


def rows_read(weights: Tensor, reading: Tensor) -> Tensor:
    """The rows of weights [B, N, N] that are read, by their shares [B, N]; output [B, N]."""
    return (reading.to(weights.dtype)[:, None] @ weights)[:, 0]
