"""int4: weights of four bits, with a scale and a zero for each group of neighbours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import TransformKind, as_patterns, plain_weight, replace_linears, treated_copy

_STEPS = 15  # between the least and the largest of a group
_BLOCK = 512  # outputs whose float weights are whole at once


class Int4Linear(nn.Module):
    """A linear layer whose weight takes four bits and, for each group of inputs, a scale and a zero of 16 bits each.

    With groups of 64 a weight takes 4.5 bits. The weight is made float again in use, some outputs at a time, so the
    layer is small and not fast. Gradients flow to x, and the layer itself does not learn.

    Args:
        in_features: I, even, a multiple of `group_size`.
        out_features: O.
        group_size: Inputs that share a scale.
        bias: Whether a bias is added, in the dtype of the layer.

    Shape:
        x: [..., I]; output: [..., O].

    Raises:
        ArgumentError: If a size is not positive or groups do not divide the inputs.

    Source:
        Frantar et al. 2022, arXiv:2210.17323, section 5: asymmetric groups.
    """

    made_by: TransformKind = "quantize"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 64,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(in_features=in_features, out_features=out_features, group_size=group_size)
        check_groups("in_features", in_features, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = out_features, in_features // group_size
        self.packed: Tensor
        self.scales: Tensor
        self.zeros: Tensor
        self.bias: Tensor | None
        self.register_buffer("packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.ones(shape, dtype=torch.bfloat16, device=device))  # of any weight's range
        self.register_buffer("zeros", torch.zeros(shape, dtype=torch.bfloat16, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None)

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, group_size: int = 64) -> "Int4Linear":
        """The layer with each weight rounded to the nearest of its group's 16 steps."""
        made = cls.like(layer, group_size=group_size)
        weight = plain_weight(layer)
        made.set_ranges(weight)
        made.set_codes(made.codes_of(weight))
        return made

    @classmethod
    def like(cls, layer: nn.Linear, *, group_size: int) -> "Int4Linear":
        """A layer of the same sizes and bias, whose weight is not set."""
        made = cls(
            layer.in_features,
            layer.out_features,
            group_size=group_size,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        if layer.bias is not None:
            made.bias = layer.bias.detach().clone()
        return made

    def set_ranges(self, weight: Tensor, groups: slice = slice(None)) -> None:
        """Scales and zeros from the least and the largest of each group, 0 among them. weight: [O, inputs of those]."""
        grouped = weight.view(self.out_features, -1, self.group_size)
        least, largest = grouped.amin(dim=2).clamp_max(0), grouped.amax(dim=2).clamp_min(0)
        scale = (largest - least) / _STEPS
        self.scales[:, groups] = torch.where(scale > 0, scale, 1.0).to(self.scales.dtype)
        # 0 is a step, so that what is zero (pruned, padded) stays zero
        self.zeros[:, groups] = (-least / self.scales[:, groups].float()).round().clamp(0, _STEPS).to(self.zeros.dtype)

    def codes_of(self, weight: Tensor, groups: slice = slice(None)) -> Tensor:
        """The nearest codes, 0 to 15, as floats. weight: [O, inputs of the groups]; output as weight."""
        scale, zero = (self._spread(part[:, groups]) for part in (self.scales, self.zeros))
        return (weight / scale + zero).round().clamp_(0, _STEPS)

    def values_of(self, codes: Tensor, groups: slice = slice(None)) -> Tensor:
        """What codes stand for, float32. codes: [O, inputs of the groups]; output as codes."""
        scale, zero = (self._spread(part[:, groups]) for part in (self.scales, self.zeros))
        return (codes - zero) * scale

    def set_codes(self, codes: Tensor) -> None:
        """Pack codes [O, I], two to a byte, the first in the lower half."""
        whole = codes.to(torch.uint8)
        self.packed.copy_(whole[:, ::2] | whole[:, 1::2] << 4)

    def dequantized_weight(self, outputs: slice = slice(None)) -> Tensor:
        """The weight that the codes stand for, [O, I], in the dtype of the layer."""
        packed = self.packed[outputs]
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).float()
        scale, zero = (self._spread(part[outputs]) for part in (self.scales, self.zeros))
        return ((codes - zero) * scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        blocks = [slice(i, i + _BLOCK) for i in range(0, self.out_features, _BLOCK)]
        parts = [nn.functional.linear(x, self.dequantized_weight(block)) for block in blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype  # there may be no bias
        return moved

    def _spread(self, by_group: Tensor) -> Tensor:
        """[O, groups] -> [O, inputs] float32."""
        return by_group.float().repeat_interleave(self.group_size, dim=1)


class QuantizeInt4:
    """Rounds the weights of every linear layer to the nearest of 16 steps; inputs stay in floats.

    Args:
        group_size: Inputs that share a scale.
        skip: Patterns, as in fnmatch, of the paths of layers to leave in floats.

    Raises:
        ArgumentError: If groups do not divide a layer's inputs, or weights are shared or not finite.
        CombinationError: If the model was rounded or adapted before.

    Source:
        Frantar et al. 2022, arXiv:2210.17323, section 5, there called RTN.
    """

    kind: TransformKind = "quantize"

    def __init__(self, *, group_size: int = 64, skip: Sequence[str] = ()) -> None:
        require_positive_int(group_size=group_size)
        self.group_size, self.skip = group_size, as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        rounded = treated_copy(model, self)

        def make(path: str, layer: nn.Linear) -> nn.Module:
            check_groups(path, layer.in_features, self.group_size)
            return Int4Linear.from_linear(layer, group_size=self.group_size)

        replace_linears(rounded, make, skip=self.skip)
        return rounded

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def __repr__(self) -> str:
        return f"QuantizeInt4(group_size={self.group_size})"


def check_groups(name: str, in_features: int, group_size: int) -> None:
    """Refuse groups that do not divide the inputs, or inputs that do not fill whole bytes.

    Raises:
        ArgumentError: If so; it lists the sizes that work.
    """
    if in_features % 2:
        raise ArgumentError(f"inputs must be even, two to a byte; {name} has {in_features}. Skip the layer.")
    if in_features % group_size:
        works = [size for size in range(2, in_features + 1) if in_features % size == 0]
        near = sorted(sorted(works, key=lambda size: abs(size - group_size))[:4])
        raise ArgumentError(
            f"group_size must divide the inputs of every layer; got {group_size} for {name} of {in_features}. Choose "
            f"from {', '.join(map(str, near))}, or skip the layer."
        )
