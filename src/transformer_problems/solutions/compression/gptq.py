"""GPTQ: weights are rounded one after the other, and the ones still to come make up for the error."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    matches,
    plain_weight,
    replace_linears,
    treated_copy,
)
from transformer_problems.solutions.compression.calibration import Inputs, input_statistic
from transformer_problems.solutions.compression.int4 import Int4Linear, check_groups


class GPTQ:
    """Rounds the weights of every linear layer to four bits such that its outputs, not its weights, change least.

    With H the second moments of a layer's inputs on some samples, input by input each weight is rounded, and its error,
    spread by the inverse of H, is added to the weights that are not yet rounded. The format and the cost in use are
    those of QuantizeInt4; rounding costs O(I^2 O) for each layer, once.

    Args:
        calibration: Inputs of the model, each a tensor or a tuple of its arguments; with fewer tokens than a layer has
            inputs H is singular, and damping decides.
        group_size: Inputs that share a scale.
        damping: Share of the mean of H's diagonal that is added to it.
        skip: Patterns, as in fnmatch, of the paths of layers to leave in floats.

    Raises:
        ArgumentError: If groups do not divide a layer's inputs, calibration is empty, not finite or misses a layer, or
            weights are shared or not finite.
        CombinationError: If the model was rounded or adapted before.

    Source:
        Frantar et al. 2022, arXiv:2210.17323, algorithm 1. Differs from the paper: all layers see the inputs of the
        unrounded model, where the paper rounds layer after layer and feeds what rounded ones give; columns are not
        taken in blocks.
    """

    kind: TransformKind = "quantize"

    def __init__(
        self,
        calibration: Sequence[Inputs],
        *,
        group_size: int = 64,
        damping: float = 0.01,
        skip: Sequence[str] = (),
    ) -> None:
        require_positive_int(group_size=group_size)
        require_positive(damping=damping)
        self.calibration, self.group_size, self.damping = calibration, group_size, damping
        self.skip = as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        rounded = treated_copy(model, self)
        for path, part in rounded.named_modules():  # before the work begins
            if isinstance(part, nn.Linear) and not matches(path, self.skip):
                check_groups(path, part.in_features, self.group_size)
        moments = input_statistic(rounded, self.calibration, _add_moments, skip=self.skip)

        def make(path: str, layer: nn.Linear) -> nn.Module:
            return gptq_linear(layer, moments[path], group_size=self.group_size, damping=self.damping)

        replace_linears(rounded, make, skip=self.skip)
        return rounded

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        rebuilt = treated_copy(model, self)
        replace_linears(rebuilt, lambda path, layer: Int4Linear.like(layer, group_size=self.group_size), skip=self.skip)
        return rebuilt

    def __repr__(self) -> str:
        return f"GPTQ(group_size={self.group_size}, damping={self.damping:g})"


@torch.no_grad()
def gptq_linear(layer: nn.Linear, moments: Tensor, *, group_size: int, damping: float) -> Int4Linear:
    """One layer rounded with the second moments of its inputs, [I, I].

    A group's range is set when its first input is reached, from the weights as they then are.
    """
    made = Int4Linear.like(layer, group_size=group_size)
    weight, keep = plain_weight(layer).clone(), getattr(layer, "keep", None)
    codes, factor = torch.zeros_like(weight), _inverse_factor(moments.double(), damping).float()
    for i in range(layer.in_features):
        group = i // group_size
        if i % group_size == 0:
            made.set_ranges(weight[:, i : i + group_size], slice(group, group + 1))
        scale, zero = made.scales[:, group].float(), made.zeros[:, group].float()
        codes[:, i] = (weight[:, i] / scale + zero).round().clamp_(0, 15)
        error = (weight[:, i] - (codes[:, i] - zero) * scale) / factor[i, i]
        change = error[:, None] * factor[i, i:]
        weight[:, i:] -= change if keep is None else change * keep[:, i:]  # what was pruned stays zero
    made.set_codes(codes)
    return made


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; inputs that never occur count as independent."""
    diagonal = moments.diagonal()
    damped = moments + torch.diag(torch.where(diagonal > 0, damping * diagonal.mean(), 1.0))
    lower, failed = torch.linalg.cholesky_ex(damped)
    factor: Tensor
    factor, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_too:
        raise ArgumentError(f"damping must be large enough for so few inputs; got {damping:g}. Choose 0.01.")
    return factor


def _add_moments(so_far: Tensor | None, inputs: Tensor) -> Tensor:
    """Sums of products of inputs, [I, I]. inputs: [tokens, I]."""
    wide = inputs.float()
    moments = wide.T @ wide
    return moments if so_far is None else so_far + moments
