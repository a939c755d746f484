"""Attention rollout: attention multiplied through the layers."""

from torch import Tensor, nn

from transformer_problems.solutions.interpretability.attention_maps import mixing_matrices, reading_of, rows_read
from transformer_problems.solutions.interpretability.attribution import Attribution, pose
from transformer_problems.solutions.interpretability.readable import Readable


class AttentionRollout:
    """Traces the answer's position through all layers: the product of 0.5 A + 0.5 I, heads averaged.

    The half of the identity stands for the skip around attention. One forward pass and L products of a row with a
    matrix, L N^2 operations. Values, feed-forward networks, norms and signs are ignored; the same for every target.

    Raises:
        ArgumentError: If the input does not fit the model.
        CombinationError: If the model has no attention weights, or negative ones.

    Source:
        Abnar and Zuidema 2020, arXiv:2005.00928, section 3.

    Example:
        >>> import torch
        >>> from transformer_problems import AttentionRollout, Decoder, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> round(float(AttentionRollout().explain(model, torch.tensor([[7, 42, 3, 9]])).scores.sum()), 3)
        1.0
    """

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution:
        case = pose(model, tokens, key_mask=key_mask, target=target)
        scores = reading_of(case)
        for layer in reversed(mixing_matrices(case)):
            scores = rows_read(layer, scores)
        return case.attribution(
            "attention rollout",
            "The share of the answer's position that comes from the token, if every layer mixed tokens by attention "
            "and skip alone, from 0 to 1; shares add up to 1.",
            scores,
        )
