"""QLoRA: adapters beside a frozen base of four bits a weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.transforms import TransformKind
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.adaptation.nf4 import NF4Codes, dequantize_nf4, packed_sizes, quantize_nf4


class NF4Linear(nn.Module):
    """A frozen linear layer that keeps its weight in four bits and unpacks it whenever it is used.

    The backward pass unpacks it once more in place of keeping it, so that no more than one layer's weight is whole at
    any moment. Gradients flow to x alone.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether a bias is added; it is kept as it is.

    Shape:
        x: [..., I]; output: [..., O].

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5.
    """

    made_by: TransformKind = "quantize"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        packed, scales, steps = packed_sizes(in_features * out_features)
        self.packed: Tensor
        self.scales: Tensor
        self.steps: Tensor
        self.mean: Tensor
        self.bias: Tensor | None
        self.register_buffer("packed", torch.zeros(packed, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.int8, device=device))
        self.register_buffer("steps", torch.zeros(steps, dtype=torch.float32, device=device))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "NF4Linear":
        """The layer with its weight rounded.

        Raises:
            ArgumentError: If the weight is not finite.
        """
        weight = layer.weight
        made = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        codes = quantize_nf4(weight)
        made.packed, made.scales, made.steps, made.mean = codes.packed, codes.scales, codes.steps, codes.mean
        if layer.bias is not None:
            made.bias = layer.bias.detach().clone()
        return made

    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, [O, I]."""
        codes = NF4Codes(self.packed, self.scales, self.steps, self.mean)
        return dequantize_nf4(codes, torch.Size((self.out_features, self.in_features)), self.dtype)

    def as_linear(self, change: Tensor) -> nn.Linear:
        """A plain layer of the rounded weight and a change to it, [O, I]."""
        layer = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.packed.device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(self.dequantized_weight() + change)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T, which keeps the packed weight for its backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized_weight())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized_weight(), None


class QLoRA(LoRA):
    """LoRA whose frozen base is rounded to four bits, some 4.13 bits a weight in memory and on disk.

    Embeddings, norms and layers without an adapter keep their floats. `merge` gives plain layers of the rounded base
    and the adapters; `undo` leaves the rounded base, for what rounding took away is gone.

    Args:
        rank: R, the width of an adapter.
        alpha: Adapters are scaled by alpha / R.
        dropout: Of the adapters' inputs.
        targets: Patterns, as in fnmatch, of the paths of the layers that are rounded and get an adapter.
        skip: Patterns of layers that stay as they are all the same.
        train: Patterns of the parameters that learn beside the adapters.
        seed: Of the adapters' start.

    Raises:
        ArgumentError: If a size does not fit, patterns name nothing, weights are shared or not finite.
        CombinationError: If the model has adapters already.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3.
        Differs from the paper: scales are rounded to 8-bit integers, and optimizer state is not paged to the host.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import QLoRA
        >>> model = QLoRA(rank=4)(nn.Sequential(nn.Linear(64, 64)))
        >>> model[0].base
        NF4Linear(in_features=64, out_features=64, bias=True)
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        targets: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
        train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(rank, alpha, dropout=dropout, targets=targets, skip=skip, train=train, seed=seed)

    def base_of(self, path: str, layer: nn.Linear) -> nn.Module:
        return NF4Linear.from_linear(layer)
