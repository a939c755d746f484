"""Gradient clipping: by the norm of the whole gradient, by value, or by each unit's own size."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.solutions.training.recipe import dense_gradients

ClippingMethod = Literal["norm", "value", "adaptive"]
_SMALLEST_UNIT = 1e-3  # norm below which a unit's weights do not limit its gradient, so that zeros can learn


@dataclass(frozen=True, slots=True)
class GradientClipping:
    """Limits gradients in place, between the backward pass and the optimizer's step.

    "norm" scales the whole gradient down to the limit, direction kept. "value" cuts each element to +-limit, which
    turns the direction. "adaptive" limits each unit's gradient (a row of a matrix, a filter, a whole vector) to the
    limit times the norm of that unit's weights, so that no step of plain gradient descent changes a unit by more than
    that share times the learning rate. A gradient that is not finite stays as it is, since no limit mends it; one whose
    norm alone is too large for its dtype is clipped in float64.

    Args:
        limit: Largest norm, value, or ratio of gradient to weights; usual are a norm of 1 and a ratio of 0.01.
        method: What is limited.

    Raises:
        ArgumentError: If the limit is not positive or the method is none of the three.
        CombinationError: When called, if a gradient is sparse.

    Source:
        Pascanu et al. 2012, arXiv:1211.5063, section 3.2 (norm, and Mikolov's cut by value); Brock et al. 2021,
        arXiv:2102.06171, section 4.1 (adaptive).
        Differs from the latter: all parameters are clipped, the output layer too; all of a vector is one unit.

    Example:
        >>> import torch
        >>> from transformer_problems import GradientClipping
        >>> model = torch.nn.Linear(4, 1)
        >>> (1000 * model(torch.ones(2, 4))).sum().backward()
        >>> norm_before = GradientClipping(1.0)(model.parameters())
        >>> bool(norm_before > 1000)
        True
    """

    limit: float = 1.0
    method: ClippingMethod = "norm"

    def __post_init__(self) -> None:
        require_positive(limit=self.limit)
        if self.method not in get_args(ClippingMethod):
            raise UnknownNameError("clipping method", str(self.method), get_args(ClippingMethod))

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip, and give the norm of the whole gradient before that, a scalar."""
        learned = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = dense_gradients(learned)
        if not gradients:
            return torch.zeros(())
        norm = nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            # scaled by it, every gradient would be NaN, and nobody could tell where it began
            return norm if norm.dtype == torch.float64 else self._clip_in_float64(learned)
        match self.method:
            case "norm":
                nn.utils.clip_grads_with_norm_(learned, self.limit, norm)
            case "value":
                nn.utils.clip_grad_value_(learned, self.limit)
            case "adaptive":
                for parameter, gradient in zip(learned, gradients, strict=True):
                    self._clip_units(parameter.detach(), gradient)
        return norm

    def _clip_in_float64(self, learned: list[nn.Parameter]) -> Tensor:
        """For gradients whose numbers may all be finite, while their squares are not."""
        wide = [nn.Parameter(parameter.detach().double()) for parameter in learned]
        for copy, gradient in zip(wide, dense_gradients(learned), strict=True):
            copy.grad = gradient.double()
        norm = self(wide)
        if bool(norm.isfinite()):
            for gradient, clipped in zip(dense_gradients(learned), dense_gradients(wide), strict=True):
                gradient.copy_(clipped)
        return norm

    def _clip_units(self, weights: Tensor, gradient: Tensor) -> None:
        largest = self.limit * _unit_norms(weights).clamp(min=_SMALLEST_UNIT)
        gradient.mul_((largest / _unit_norms(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)).clamp(max=1.0))


def _unit_norms(values: Tensor) -> Tensor:
    """Norm of each output unit's values, kept broadcastable: a row of a matrix, a filter, all of a vector."""
    within = tuple(range(min(1, values.dim() - 1), values.dim()))
    norms: Tensor = torch.linalg.vector_norm(values, dim=within, keepdim=True)
    return norms
