"""SmoothQuant: large activations are divided, and the weights they meet multiplied, before both are rounded."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_share
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    replace_linears,
    replace_modules,
    treated_copy,
)
from transformer_problems.solutions.compression.calibration import Inputs, input_statistic, largest_of_each

_SMALLEST = 1e-5


class ScaledLinear(nn.Linear):
    """A linear layer that divides its inputs by a scale each, which its weight was multiplied by.

    Shape:
        x: [..., I]; output: [..., O]; input_scale: [I].
    """

    made_by: TransformKind = "scale"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.input_scale: Tensor
        self.register_buffer("input_scale", torch.ones(in_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, layer: nn.Linear, input_scale: Tensor) -> "ScaledLinear":
        """The layer with scales moved from its inputs to its weight; outputs are equal up to rounding."""
        weight, has_bias = layer.weight, layer.bias is not None
        made = cls(layer.in_features, layer.out_features, has_bias, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            made.input_scale.copy_(input_scale)
            made.weight.copy_(weight * made.input_scale)
            if has_bias:
                made.bias.copy_(layer.bias)
        for name, parameter in layer.named_parameters(recurse=False):
            getattr(made, name).requires_grad_(parameter.requires_grad)
        return made

    def plain(self) -> nn.Linear:
        """The layer without scales."""
        layer = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(self.weight / self.input_scale)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x / self.input_scale, self.weight, self.bias)


class SmoothQuant:
    """Evens out the inputs of every linear layer at the expense of its weight, so that int8 suits both.

    A few inputs of large models are a hundred times larger than the others, which one step for all must reach. Input j
    is divided by max|x_j|^alpha / max|W_j|^(1 - alpha), from some samples. Outputs stay as they are; what comes after
    it, QuantizeInt8, gains.

    Args:
        calibration: Inputs of the model, each a tensor or a tuple of its arguments.
        alpha: How much of the range moves to the weights.
        skip: Patterns, as in fnmatch, of the paths of layers to leave alone.

    Raises:
        ArgumentError: If alpha is no share, calibration is empty, not finite or misses a layer, or weights are shared
            or not finite.
        CombinationError: If the model was rounded or adapted before.

    Source:
        Xiao et al. 2022, arXiv:2211.10438, section 4. Differs from the paper: the division stays with the layer, where
        the paper folds it into the norm before it, so that it works wherever a layer stands.
    """

    kind: TransformKind = "scale"

    def __init__(self, calibration: Sequence[Inputs], *, alpha: float = 0.5, skip: Sequence[str] = ()) -> None:
        require_share(alpha=alpha)
        self.calibration, self.alpha, self.skip = calibration, alpha, as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        smoothed = treated_copy(model, self)
        largest = input_statistic(smoothed, self.calibration, largest_of_each, skip=self.skip)

        def make(path: str, layer: nn.Linear) -> nn.Module:
            columns = layer.weight.detach().float().abs().amax(dim=0).clamp_min(_SMALLEST)
            scale = largest[path].clamp_min(_SMALLEST) ** self.alpha / columns ** (1 - self.alpha)
            return ScaledLinear.from_linear(layer, scale.clamp_min(_SMALLEST))

        replace_linears(smoothed, make, skip=self.skip)
        return smoothed

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        rebuilt = treated_copy(model, self)
        replace_linears(
            rebuilt,
            lambda path, layer: ScaledLinear.from_linear(layer, torch.ones(layer.in_features)),
            skip=self.skip,
        )
        return rebuilt

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy with plain layers again, equal to the original up to rounding.

        Raises:
            ArgumentError: If there is none to be had.
        """
        plain = copy.deepcopy(model)

        def made(path: str, part: nn.Module) -> nn.Module:
            assert isinstance(part, ScaledLinear)
            return part.plain()

        if not replace_modules(plain, lambda path, part: isinstance(part, ScaledLinear), made):
            raise ArgumentError(f"model must hold scaled layers; this {type(model).__name__} has none.")
        return plain

    def __repr__(self) -> str:
        return f"SmoothQuant(alpha={self.alpha:g})"
