"""Gradient times input: how strongly the answer reacts to each token, to first order."""

from torch import Tensor, nn

from transformer_problems.solutions.interpretability.attribution import Attribution, pose, widened
from transformer_problems.solutions.interpretability.readable import Readable


class GradientXInput:
    """The target logit's gradient with respect to each token's embedding, times that embedding, summed over C.

    What the logit would lose, to first order, if the embedding shrank to zero. One forward and one backward pass.
    Blind where the model is saturated: a gradient of zero does not mean that the token is not needed. A norm saturates:
    in a pre-norm model that adds no positions to its embeddings (rotary ones turn queries and keys), what the first
    layer's attention takes from other tokens has no score. `IntegratedGradients` from a neutral token finds it.

    Raises:
        ArgumentError: If the input does not fit the model, or gradients are not finite.
        CombinationError: If the model passes no gradients to its embeddings.

    Source:
        Shrikumar et al. 2016, arXiv:1605.01713. Differs from the paper: one score a token, the sum over
        its embedding.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, GradientXInput, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> GradientXInput().explain(model, torch.tensor([[7, 42, 3, 9]]), target=5).scores.shape
        torch.Size([1, 4])
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
        embeddings = case.model.embed(tokens)
        scores = (case.gradient(embeddings) * widened(embeddings)).sum(dim=-1)
        return case.attribution(
            "gradient x input",
            "The change of the target's logit, to first order, that the token's embedding makes against one of zero, "
            "in logits.",
            scores,
        )
