"""Random scores: the control that every explanation has to beat."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative
from transformer_problems.core.seeding import generator
from transformer_problems.solutions.interpretability.attribution import Attribution, pose, widened
from transformer_problems.solutions.interpretability.readable import Readable


class RandomScores:
    """A score drawn evenly from 0 to 1 for each token, whatever the model does.

    Args:
        seed: Of the draws.

    Raises:
        ArgumentError: If the seed is negative, or the input does not fit the model.

    Source:
        DeYoung et al. 2020, arXiv:1911.03429, who set random scores beside every method.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, RandomScores, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> RandomScores(seed=1).explain(model, torch.tensor([[7, 42, 3, 9]])).scores.shape
        torch.Size([1, 4])
    """

    def __init__(self, *, seed: int = 0) -> None:
        require_not_negative(seed=seed)
        self.seed = seed

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution:
        case = pose(model, tokens, key_mask=key_mask, target=target)
        draws = torch.rand(tokens.shape, generator=generator(self.seed, "random scores"))
        return case.attribution(
            "random", "Nothing: a number drawn at random, from 0 to 1.", draws.to(widened(case.logits))
        )
