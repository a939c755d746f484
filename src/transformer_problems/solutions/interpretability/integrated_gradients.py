"""Integrated gradients: gradients summed on the way from a neutral input, so that they add up to the answer."""

from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.interpretability.attribution import Attribution, Case, chosen, pose, widened
from transformer_problems.solutions.interpretability.readable import Readable


class IntegratedGradients:
    """The mean gradient on the straight line from a baseline to the input, times their difference, summed over C.

    Scores add up to the target logit's change from baseline to input (completeness), as far as `steps` points of
    Gauss-Legendre quadrature resolve the line; `completeness_gap` says how far they do not. `steps` forward and
    backward passes.

    The baseline is the embedding of zero, or that of a token, at every real position; positions are added to both
    alike. Norms bend the line sharply near an embedding of zero where nothing else is added to it (no positions, or
    rotary ones): a neutral token's gap is smaller there.

    Args:
        steps: Points on the line.
        baseline_token: The neutral token, such as a padding or mask token. Default none: the embedding of zero.

    Raises:
        ArgumentError: If an argument is out of range, the input does not fit the model, or gradients are not finite.
        CombinationError: If the model passes no gradients to its embeddings.

    Source:
        Sundararajan et al. 2017, arXiv:1703.01365, section 3. Differs from the paper: Gauss-Legendre quadrature in
        place of a Riemann sum; one score a token, the sum over its embedding.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, IntegratedGradients, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> found = IntegratedGradients(steps=32, baseline_token=0).explain(model, torch.tensor([[7, 42, 3, 9]]))
        >>> found.scores.shape, found.completeness_gap.shape
        (torch.Size([1, 4]), torch.Size([1]))
    """

    def __init__(self, *, steps: int = 50, baseline_token: int | None = None) -> None:
        require_positive_int(steps=steps)
        if baseline_token is not None:
            _check_token(baseline_token)
        self.steps, self.baseline_token = steps, baseline_token

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution:
        case = pose(model, tokens, key_mask=key_mask, target=target)
        embeddings, baseline = case.model.embed(tokens), self._baseline(case)
        start, difference = widened(baseline), widened(embeddings) - widened(baseline)
        points, weights = np.polynomial.legendre.leggauss(self.steps)  # on [-1, 1]
        mean = torch.zeros_like(difference)
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            mean += float(weight) * case.gradient((start + float(point) * difference).to(embeddings.dtype))
        scores = (mean * difference).sum(dim=-1)
        with torch.no_grad():
            change = chosen(case.logits, case.target) - widened(case.target_logits(baseline))
        return case.attribution(
            "integrated gradients",
            f"The token's part of the target logit's change from {self._baseline_name} at every token to the input, in "
            "logits; parts add up to the change.",
            scores,
            completeness_gap=scores.sum(dim=1) - change,
        )

    @property
    def _baseline_name(self) -> str:
        return "an embedding of zero" if self.baseline_token is None else f"token {self.baseline_token}"

    def _baseline(self, case: Case) -> Tensor:
        if self.baseline_token is None:
            return torch.zeros_like(case.model.embed(case.tokens))
        if self.baseline_token >= case.model.vocab_size:
            raise ArgumentError(
                f"baseline_token must be from 0 to {case.model.vocab_size - 1}; got {self.baseline_token}. Choose a "
                "neutral token of the model's vocabulary."
            )
        return case.model.embed(torch.full_like(case.tokens, self.baseline_token))


def _check_token(baseline_token: int) -> None:
    if not isinstance(baseline_token, Integral) or isinstance(baseline_token, bool) or baseline_token < 0:
        raise ArgumentError(
            f"baseline_token must be a token, a whole number from 0; got {baseline_token!r}. Leave it out for the "
            "embedding of zero."
        )
