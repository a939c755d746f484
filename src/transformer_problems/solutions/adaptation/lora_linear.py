"""The layer of LoRA: a frozen matrix product, and a product of two thin matrices beside it that learns."""

import math
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import TransformKind


class PackedLinear(Protocol):
    """A frozen linear layer that keeps no float weight, and lets gradients through to its input."""

    in_features: int
    out_features: int
    bias: Tensor | None
    dtype: torch.dtype
    training: bool

    def __call__(self, x: Tensor) -> Tensor: ...

    def dequantized_weight(self) -> Tensor: ...


class LoRALinear(nn.Module):
    """base(x) + alpha / R * B A x with a base that does not learn, A [R, I] and B [O, R].

    B starts at zero, so the layer starts as its base. Costs 2 R (I + O) FLOPs a token beside the base, and nothing
    once merged.

    Args:
        base: A linear layer, or a PackedLinear.
        rank: R.
        alpha: The change is scaled by alpha / R, so that a learning rate suits any rank.
        dropout: Share of the adapter's inputs that are zeroed while training.
        draws: Where A's values come from.

    Shape:
        x: [..., I]; output: [..., O].
    """

    made_by: TransformKind = "adapt"

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0, draws: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.train(base.training)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        (num_outputs, num_inputs), device, dtype = place_of(base)
        bound = 1 / math.sqrt(num_inputs)  # Kaiming uniform with a = sqrt(5), as nn.Linear starts
        start = (torch.rand(rank, num_inputs, generator=draws) * 2 - 1) * bound
        self.lora_a = nn.Parameter(start.to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(num_outputs, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        inputs = nn.functional.dropout(x, self.dropout, self.training)
        narrow = nn.functional.linear(inputs, self.lora_a)  # [..., R]
        rows, scale = y.shape[:-1].numel(), self.alpha / self.rank
        base = y.reshape(rows, y.shape[-1])
        return torch.addmm(base, narrow.reshape(rows, self.rank), self.lora_b.t(), alpha=scale).view_as(y)

    def change(self) -> Tensor:
        """alpha / R B A, [O, I], in float32 or wider."""
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        return (self.alpha / self.rank) * (self.lora_b.detach().to(wide) @ self.lora_a.detach().to(wide))

    def merged(self) -> nn.Module:
        """A plain layer whose weight is the base's and the change.

        Raises:
            CombinationError: If the base keeps some of its weights at zero.
        """
        if getattr(self.base, "keep", None) is not None:
            raise CombinationError(
                f"an adapter cannot be merged into a {type(self.base).__name__}, whose zeros it would fill. Keep it "
                "unmerged, or adapt first and prune the merged model."
            )
        if not isinstance(self.base, nn.Linear):
            return _plain(cast("PackedLinear", self.base), self.change())
        layer, change = self.base, self.change()
        input_scale = getattr(layer, "input_scale", None)  # of a base that divides its inputs
        layer.weight.data = (layer.weight + (change if input_scale is None else change * input_scale)).to(
            layer.weight.dtype
        )
        return layer.requires_grad_(True)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight an earlier treatment rounded."""
    return getattr(module, "made_by", None) == "quantize" and hasattr(module, "dequantized_weight")


def check_gradients(path: str, layer: nn.Module) -> None:
    """Refuse a packed layer through which no gradient flows, for adapters of earlier layers would not learn.

    Raises:
        CombinationError: If so.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            (_, num_inputs), device, dtype = place_of(layer)
            passes = layer(torch.zeros(1, num_inputs, device=device, dtype=dtype, requires_grad=True)).requires_grad
    except ArgumentError:
        passes = False
    if not passes:
        raise CombinationError(
            f"adapters need layers that pass gradients on; {path}, a {type(layer).__name__}, does not. Adapt the float "
            "model, or round it to four bits."
        )


def _plain(base: PackedLinear, change: Tensor) -> nn.Linear:
    """A layer of floats with the weight that the codes stand for and a change to it, [O, I]."""
    weight = base.dequantized_weight()
    layer = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta", dtype=base.dtype)
    layer.weight = nn.Parameter((weight + change).to(base.dtype))
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().clone())
    return layer.train(base.training)


def place_of(base: nn.Module) -> tuple[torch.Size, torch.device, torch.dtype]:
    """The shape of a base's weight, its device, and the dtype that it computes in."""
    if isinstance(base, nn.Linear):
        return base.weight.shape, base.weight.device, base.weight.dtype
    packed = cast("PackedLinear", base)
    shape = torch.Size((packed.out_features, packed.in_features))
    dtype = getattr(packed, "dtype", torch.get_default_dtype())
    return shape, next(base.buffers()).device, dtype
