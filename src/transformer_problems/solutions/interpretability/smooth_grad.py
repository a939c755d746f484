"""SmoothGrad: gradients averaged over noisy copies of the input."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import (
    require_finite,
    require_not_negative,
    require_positive,
    require_positive_int,
)
from transformer_problems.core.seeding import generator
from transformer_problems.solutions.interpretability.attribution import Attribution, Case, pose, widened
from transformer_problems.solutions.interpretability.readable import Readable


class SmoothGrad:
    """The target logit's mean gradient over noisy copies of the embeddings, times the embedding, summed over C.

    Gradients of a trained network jump between inputs that look alike; the mean shows what they share. The noise is
    normal, its standard deviation a share of the range from the smallest to the largest number in a sequence's real
    embeddings. As many forward and backward passes as copies. Every sequence gets the same noise, so that its scores
    do not depend on its batch.

    Args:
        noise: The share of that range.
        samples: Noisy copies.
        seed: Of the noise.

    Raises:
        ArgumentError: If an argument is out of range, the input does not fit the model, or gradients are not finite.
        CombinationError: If the model passes no gradients to its embeddings.

    Source:
        Smilkov et al. 2017, arXiv:1706.03825. Differs from the paper: the mean gradient is multiplied by
        the input, so that a token has one signed score in logits.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, SelfAttention, SmoothGrad
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> SmoothGrad(samples=10).explain(model, torch.tensor([[7, 42, 3, 9]]), target=5).scores.shape
        torch.Size([1, 4])
    """

    def __init__(self, *, noise: float = 0.15, samples: int = 50, seed: int = 0) -> None:
        require_positive(noise=noise)
        require_finite(noise=noise)
        require_positive_int(samples=samples)
        require_not_negative(seed=seed)
        self.noise, self.samples, self.seed = noise, samples, seed

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
        spread = self.noise * _ranges(case, embeddings)[:, None, None]
        draws = generator(self.seed, "smooth grad")
        mean = torch.zeros_like(widened(embeddings))
        for _ in range(self.samples):
            noise = torch.randn(embeddings.shape[1:], generator=draws, dtype=mean.dtype).to(mean.device)
            mean += case.gradient((embeddings + spread * noise).to(embeddings.dtype)) / self.samples
        scores = (mean * widened(embeddings)).sum(dim=-1)
        return case.attribution(
            "SmoothGrad",
            "The change of the target's logit, to first order and averaged over noisy copies of the input, that the "
            "token's embedding makes against one of zero, in logits.",
            scores,
        )


def _ranges(case: Case, embeddings: Tensor) -> Tensor:
    """From the smallest to the largest number in each sequence's real embeddings, [B]."""
    padding = ~case.real[..., None]
    highest = widened(embeddings).masked_fill(padding, -torch.inf).amax(dim=(1, 2))
    return highest - widened(embeddings).masked_fill(padding, torch.inf).amin(dim=(1, 2))
