"""int8: weights of eight bits, and activations rounded to as many on their way in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import TransformKind, as_patterns, replace_linears, treated_copy
from transformer_problems.kernels.int8_product import Int8Backend, fastest, int8_product
from transformer_problems.solutions.compression.calibration import Inputs, input_statistic, largest_of_each


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with a scale for each output, and whose inputs are rounded to int8 too.

    The product runs in integers, which processors multiply several times as fast as floats, and reads a quarter of the
    bytes. It does not learn: gradients are not defined.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether a bias is added, in float32.
        is_static: Inputs are rounded by one scale for all, found by calibration, in place of each row's own.
        is_scaled: Inputs are divided by a scale each before (SmoothQuant).
        backend: What multiplies; "auto" races what the machine has, once for each size.

    Shape:
        x: [..., I]; output: [..., O].

    Raises:
        ArgumentError: If a size is not positive, or an input asks for a gradient.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, section 2; a scale for each row and each output: Dettmers et al. 2022,
        arXiv:2208.07339, section 2.1. Differs from the papers: all scales are symmetric, and no outliers are kept in
        floats.
    """

    made_by: TransformKind = "quantize"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        is_static: bool = False,
        is_scaled: bool = False,
        backend: Int8Backend | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        self.codes: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.x_scale: Tensor | None
        self.input_scale: Tensor | None
        self._operands: tuple[Any, ...] | None = None
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.ones(out_features, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self.register_buffer("x_scale", torch.ones((), device=device) if is_static else None)
        self.register_buffer("input_scale", torch.ones(in_features, device=device) if is_scaled else None)

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, *, largest_input: float | None = None, backend: Int8Backend | Literal["auto"] = "auto"
    ) -> "Int8Linear":
        """The layer with each row of its weight rounded to the nearest of 255 steps; a ScaledLinear keeps its scales.

        Args:
            largest_input: The magnitude that static scales must reach; None for a scale of each row's own.
        """
        weight, input_scale = layer.weight.detach().float(), getattr(layer, "input_scale", None)
        made = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            is_static=largest_input is not None,
            is_scaled=input_scale is not None,
            backend=backend,
            device=weight.device,
        )
        if input_scale is not None and made.input_scale is not None:
            made.input_scale.copy_(input_scale)
        largest = weight.abs().amax(dim=1)
        made.scales.copy_(torch.where(largest > 0, largest / 127, 1.0))
        made.codes.copy_((weight / made.scales[:, None]).round().clamp(-127, 127))
        if layer.bias is not None and made.bias is not None:
            made.bias.copy_(layer.bias.detach())
        if largest_input is not None and made.x_scale is not None:
            made.x_scale.fill_(largest_input / 127 if largest_input > 0 else 1.0)
        return made

    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, [O, I] float32."""
        return self.codes.float() * self.scales[:, None]

    def backend_for(self, num_rows: int) -> Int8Backend:
        """What answers so many rows (tokens) at once on this machine; races the back ends if they never were."""
        if self.backend != "auto":
            return self.backend
        return fastest(self.scales.new_zeros(num_rows, self.in_features), self.codes)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ArgumentError(
                "x must not ask for a gradient, which rounding has none of. Call under torch.no_grad(), or train the "
                "float model and quantize it then."
            )
        if x.shape[-1] != self.in_features:
            raise ArgumentError(f"x must be [..., {self.in_features}]; got {list(x.shape)}.")
        codes, sums, scales, bias, x_scale, input_scale = self._operands or self._collected()
        rows = (x if x.dim() == 2 else x.reshape(-1, self.in_features)).float()
        if input_scale is not None:
            rows = rows / input_scale
        y = int8_product(rows, codes, sums, scales, bias, x_scale=x_scale, backend=self.backend)
        if x.dim() != 2:
            y = y.view(*x.shape[:-1], self.out_features)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _collected(self) -> tuple[Any, ...]:
        """What the product reads; kept, for collecting it takes a while."""
        self._operands = (
            self.codes.contiguous(),
            self.codes.sum(dim=1, dtype=torch.int32),
            self.scales,
            self.bias,
            None if self.x_scale is None else float(self.x_scale),
            self.input_scale,
        )
        return self._operands

    def extra_repr(self) -> str:
        static = ", is_static=True" if self.x_scale is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{static}"

    def _load_from_state_dict(self, *arguments: object, **keywords: object) -> None:
        self._operands = None  # they belong to the codes that were there
        super()._load_from_state_dict(*arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves of a model to another device or dtype: the latter is for results and not for scales."""
        self._operands = None
        before = {name: kept for name, kept in self._buffers.items() if kept is not None}
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = getattr(self, name)
            if now.dtype != kept.dtype:
                setattr(self, name, kept.to(now.device))
        return moved


class QuantizeInt8:
    """Rounds every linear layer to int8, weights and inputs.

    Args:
        calibration: Inputs of the model, each a tensor or a tuple of its arguments: every layer's inputs are then
            rounded by one scale, the largest that these meet (static). None takes each row's own (dynamic), which costs
            a pass over the row and adapts to every input.
        skip: Patterns, as in fnmatch, of the paths of layers to leave in floats.
        backend: What multiplies; "auto" races what the machine has, once for each size.

    Raises:
        ArgumentError: If weights are shared or not finite, or calibration is empty, not finite or misses a layer.
        CombinationError: If the model was rounded or adapted before.

    Source:
        Jacob et al. 2017, arXiv:1712.05877; Dettmers et al. 2022, arXiv:2208.07339.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import QuantizeInt8
        >>> QuantizeInt8()(nn.Sequential(nn.Linear(64, 64)))[0]
        Int8Linear(in_features=64, out_features=64, bias=True)
    """

    kind: TransformKind = "quantize"

    def __init__(
        self,
        *,
        calibration: Sequence[Inputs] | None = None,
        skip: Sequence[str] = (),
        backend: Int8Backend | Literal["auto"] = "auto",
    ) -> None:
        self.calibration, self.skip, self.backend = calibration, as_patterns("skip", skip), backend

    def __call__(self, model: nn.Module) -> nn.Module:
        rounded = treated_copy(model, self)
        largest: dict[str, float] = {}
        if self.calibration is not None:
            found = input_statistic(rounded, self.calibration, largest_of_each, skip=self.skip)
            scales = {path: getattr(rounded.get_submodule(path), "input_scale", 1.0) for path in found}
            largest = {path: float((value / scales[path]).amax()) for path, value in found.items()}

        def make(path: str, layer: nn.Linear) -> nn.Module:
            return Int8Linear.from_linear(layer, largest_input=largest.get(path), backend=self.backend)

        replace_linears(rounded, make, skip=self.skip)
        return rounded

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        rebuilt = treated_copy(model, self)
        is_static = self.calibration is not None

        def make(path: str, layer: nn.Linear) -> nn.Module:
            return Int8Linear.from_linear(layer, largest_input=1.0 if is_static else None, backend=self.backend)

        replace_linears(rebuilt, make, skip=self.skip)
        return rebuilt

    def __repr__(self) -> str:
        return f"QuantizeInt8({'static' if self.calibration is not None else 'dynamic'})"
