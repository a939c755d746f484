"""QLoRA: adapters beside a frozen base of four bits a weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.transforms import TransformKind
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.adaptation.nf4 import BLOCK, NF4Codes, dequantize_nf4, packed_sizes, quantize_nf4


class NF4Linear(nn.Module):
    """A frozen linear layer that keeps its weight in four bits and unpacks it whenever it is used.

    The backward pass unpacks it once more in place of keeping it, so that no more than one layer's weight is whole at
    any moment. Gradients flow to x alone.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether a bias is added; it is kept as it is.
        block_size: Weights that share a scale.
        double_quant: Whether scales are rounded too.

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
        block_size: int = BLOCK,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        packed, scales, steps = packed_sizes(in_features * out_features, block_size)
        self.packed: Tensor
        self.scales: Tensor
        self.steps: Tensor | None
        self.mean: Tensor | None
        self.bias: Tensor | None
        kept = torch.int8 if double_quant else torch.float32
        self.register_buffer("packed", torch.zeros(packed, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(scales, dtype=kept, device=device))
        self.register_buffer("steps", torch.zeros(steps, device=device).float() if double_quant else None)
        self.register_buffer("mean", torch.zeros((), device=device).float() if double_quant else None)
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None)

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, block_size: int = BLOCK, double_quant: bool = True) -> "NF4Linear":
        """The layer with its weight rounded; scales of its inputs, or weights it keeps at zero, go into it.

        Raises:
            ArgumentError: If the weight is not finite.
        """
        weight, has_bias = layer.weight.detach(), layer.bias is not None
        made = cls(
            layer.in_features,
            layer.out_features,
            bias=has_bias,
            block_size=block_size,
            double_quant=double_quant,
            device=weight.device,
            dtype=weight.dtype,
        )
        keep, input_scale = getattr(layer, "keep", None), getattr(layer, "input_scale", None)
        weight = weight if keep is None else weight * keep
        weight = weight if input_scale is None else weight / input_scale
        codes = quantize_nf4(weight, block_size=block_size, double_quant=double_quant)
        made.packed, made.scales, made.steps, made.mean = codes.packed, codes.scales, codes.steps, codes.mean
        if has_bias:
            made.bias = layer.bias.detach().clone()
        return made.train(layer.training)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, [O, I], in the layer's dtype or another."""
        codes = NF4Codes(self.packed, self.scales, self.steps, self.mean, self.block_size)
        return dequantize_nf4(codes, torch.Size((self.out_features, self.in_features)), dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Moves of a model to another device or dtype: the latter is for results and not for scales."""
        before = {name: getattr(self, name) for name in ("scales", "steps", "mean")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = getattr(self, name)
            if kept is not None and now.dtype != kept.dtype:
                setattr(self, name, kept.to(now.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["scales"].device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T, which keeps the packed weight for its backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.dequantized_weight(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # under autocast results, and so their gradients, have another dtype than inputs
        return (grad @ ctx.layer.dequantized_weight(grad.dtype)).to(ctx.dtype), None


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
        block_size: Weights that share a scale.
        double_quant: Whether scales are rounded too; False takes 4.5 bits a weight in place of 4.13.

    Raises:
        ArgumentError: If a size does not fit, patterns name nothing or the output layer of nn.MultiheadAttention, whose
            weight is read without a call, or weights are shared or not finite.
        CombinationError: If the model has adapters already, or layers that were rounded before.

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
        block_size: int = BLOCK,
        double_quant: bool = True,
    ) -> None:
        require_positive_int(block_size=block_size)
        super().__init__(rank, alpha, dropout=dropout, targets=targets, skip=skip, train=train, seed=seed)
        self.block_size, self.double_quant = block_size, double_quant

    def base_of(self, path: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Linear):
            raise CombinationError(
                f"QLoRA makes no sense on {path}, a {type(layer).__name__}: its weights are codes already. Start from "
                "the float model, or give layers of four bits plain LoRA."
            )
        return NF4Linear.from_linear(layer, block_size=self.block_size, double_quant=self.double_quant)
