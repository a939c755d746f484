"""Wanda: a weight is worth its size times the size of what reaches it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.transforms import TransformKind, as_patterns, replace_linears, treated_copy
from transformer_problems.solutions.compression.calibration import Inputs, input_statistic
from transformer_problems.solutions.compression.sparse_linear import Pattern, SparseLinear, check_sparsity, strongest


class Wanda:
    """Puts to zero, in each row, the weights of the smallest |W_ij| |x_j|, without any training.

    |x_j| is the norm of input j over all tokens of some sample inputs, which run through the model once.

    Args:
        calibration: Inputs of the model, each a tensor or a tuple of its arguments.
        sparsity: Share of each row's weights put to zero.
        pattern: In its place (zeros, of so many), such as (2, 4).
        skip: Patterns, as in fnmatch, of the paths of layers to leave alone.

    Raises:
        ArgumentError: If a share or pattern does not fit, there are no inputs, they are not finite or do not reach a
            layer, or weights are shared or not finite.
        CombinationError: If the model was fused, rounded or adapted before.

    Source:
        Sun et al. 2023, arXiv:2306.11695, section 3. Differs from the paper: all layers are measured in the unpruned
        model, at once.
    """

    kind: TransformKind = "prune"

    def __init__(
        self,
        calibration: Sequence[Inputs],
        sparsity: float | None = None,
        *,
        pattern: Pattern | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_sparsity(sparsity, pattern)
        self.calibration, self.sparsity, self.pattern = calibration, sparsity, pattern
        self.skip = as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        pruned = treated_copy(model, self)
        squares = input_statistic(pruned, self.calibration, _add_squares, skip=self.skip)

        def prune(path: str, layer: nn.Linear) -> nn.Module:
            scores = layer.weight.detach().float().abs() * squares[path].sqrt()
            return SparseLinear.from_linear(layer, strongest(scores, path, self.sparsity, self.pattern))

        replace_linears(pruned, prune, skip=self.skip)
        return pruned

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        rebuilt = treated_copy(model, self)
        replace_linears(
            rebuilt,
            lambda path, layer: SparseLinear.from_linear(layer, torch.ones_like(layer.weight, dtype=torch.bool)),
            skip=self.skip,
        )
        return rebuilt

    def __repr__(self) -> str:
        return f"Wanda({f'sparsity={self.sparsity}' if self.pattern is None else f'pattern={self.pattern}'})"


def _add_squares(so_far: Tensor | None, inputs: Tensor) -> Tensor:
    """Sums of squares of each input over tokens, [I]. inputs: [tokens, I]."""
    squares = inputs.float().square().sum(dim=0)
    return squares if so_far is None else so_far + squares
