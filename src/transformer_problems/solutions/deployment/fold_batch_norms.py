"""Batch norms of a trained model as part of the layers before them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import TransformKind, as_patterns, check_patterns, matches, treated_copy
from transformer_problems.kernels.linear import Linear

# a layer's class -> the norm that takes its output, and the dimensions of a batch of that
_FOLDABLE: dict[type[nn.Module], tuple[type[_BatchNorm], int]] = {
    nn.Linear: (nn.BatchNorm1d, 2),
    Linear: (nn.BatchNorm1d, 2),
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Conv3d: (nn.BatchNorm3d, 5),
}


class FoldedNorm(nn.Module):
    """What stands where a batch norm was: it hands its input on, which the layer before has normalised already.

    Args:
        num_dims: Dimensions of its input. In others the norm would have taken another one for the channels.

    Shape:
        x: [B, C, ...]; output: as x.

    Raises:
        ArgumentError: If an input has other dimensions.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, section 3.2.
    """

    made_by: TransformKind = "fold"

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        self.num_dims = num_dims

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.num_dims:
            raise ArgumentError(
                f"x must have {self.num_dims} dimensions where a batch norm was folded; got {list(x.shape)}. Give such "
                "a batch, or fold with skip naming this norm."
            )
        return x

    def extra_repr(self) -> str:
        return f"num_dims={self.num_dims}"


class FoldBatchNorms:
    """Puts every batch norm's scale and shift into the weight and bias of the layer before it.

    In evaluation mode a norm multiplies each channel by s = weight / sqrt(running_var + eps) and adds
    bias - s * running_mean, both constants. A layer with weight s * W and bias s * b + bias - s * running_mean gives
    the same at once, so a kernel that reads and writes the whole map is saved for each norm; outputs are equal up to
    rounding. A FoldedNorm stays behind, so other modules keep their names.

    A norm can be folded if it comes directly after a plain linear layer or convolution in an nn.Sequential, as in
    MobileViT, InvertedResidual, MobileViTBlock and ConvolutionalStem. What was folded cannot be taken back, and trains
    from there on as a model without norms: keep the original.

    Args:
        skip: Patterns, as in fnmatch, of the paths of norms to leave alone, e.g. "stem.1".

    Raises:
        ArgumentError: If there is nothing to fold, a norm is in training mode, has no running statistics or nothing
            before it that could take it up, weights are shared or not finite, or a pattern names no norm.
        CombinationError: If the layer before a norm is more than a plain one, or the norm has hooks.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, section 3.2. Differs from the paper: after training, not within it.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import FoldBatchNorms
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU()).eval()
        >>> FoldBatchNorms()(model)[1]
        FoldedNorm(num_dims=4)
    """

    kind: TransformKind = "fold"

    def __init__(self, *, skip: Sequence[str] = ()) -> None:
        self.skip = as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        folded = treated_copy(model, self)
        for place in self._chosen(folded):
            if place.norm.training:
                raise ArgumentError(
                    "batch norms must be in evaluation mode to be folded, for in training they follow each batch; "
                    f"{place.path} is in training mode. Call eval() on the model first."
                )
        return self._fold(folded)

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        folded = treated_copy(model, self)
        for place in self._chosen(folded):
            place.norm.eval()  # as all that were folded; their values come from the file
        return self._fold(folded)

    def __repr__(self) -> str:
        return f"FoldBatchNorms({f'skip={self.skip}' if self.skip else ''})"

    def _chosen(self, model: nn.Module) -> list["_Place"]:
        places = _places(model)
        check_patterns("norm to skip", self.skip, [place.path for place in places])
        chosen = [place for place in places if not matches(place.path, self.skip)]
        if not chosen:
            found = "every one is skipped" if places else f"this {type(model).__name__} holds none"
            raise ArgumentError(f"model must hold a batch norm after a layer that is not skipped; {found}.")
        return chosen

    def _fold(self, model: nn.Module) -> nn.Module:
        chosen = self._chosen(model)
        for place in chosen:
            _check_foldable(model, place)
        for place in chosen:
            _fold(place)
        return model


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module holds a norm; a norm may have several places."""

    path: str
    parent: nn.Module
    name: str
    norm: _BatchNorm

    @property
    def layer(self) -> Any:
        """The module whose output goes into the norm here; None where the parent's own code decides on that."""
        if type(self.parent).forward is not nn.Sequential.forward:
            return None
        names = list(self.parent._modules)
        place = names.index(self.name)
        return self.parent._modules[names[place - 1]] if place else None


def _places(model: nn.Module) -> list[_Place]:
    return [
        _Place(f"{path}.{name}" if path else name, parent, name, part)
        for path, parent in model.named_modules()
        for name, part in parent._modules.items()
        if isinstance(part, _BatchNorm)
    ]


def _check_foldable(model: nn.Module, place: _Place) -> None:
    layer, norm = place.layer, place.norm
    leave = f"pass skip=({place.path!r},) to leave this norm alone"
    if layer is None:
        raise ArgumentError(
            f"a batch norm must come directly after a layer in a torch.nn.Sequential to be folded; {place.path} does "
            f"not, in a {type(place.parent).__name__}. Put both into one, or {leave}."
        )
    if _FOLDABLE.get(type(layer), (None, 0))[0] is not type(norm):
        raise CombinationError(
            "a norm can be folded if it is the plain BatchNorm1d, 2d or 3d of a plain linear layer or convolution; "
            f"{place.path} is a {type(norm).__name__} after a {type(layer).__name__}. Fold before other treatments, or "
            f"{leave}."
        )
    if any(part._forward_hooks or part._forward_pre_hooks for part in (layer, norm)):
        raise CombinationError(
            f"what is folded must have no hooks, which would see other values; {place.path} or the layer before it "
            f"has. Remove them, or {leave}."
        )
    if norm.running_mean is None:
        raise ArgumentError(
            f"a batch norm must keep running statistics to be folded; {place.path} follows each batch, having none. "
            f"Build it with track_running_stats=True and train again, or {leave}."
        )
    if _is_shared(model, layer):
        raise ArgumentError(
            f"weights must belong to one layer; those of the layer before {place.path} are used elsewhere too. Untie "
            f"them, or {leave}."
        )


def _is_shared(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer or one of its weights has a second place in the model."""
    held = Counter(id(x) for part in model.modules() for x in (*part._modules.values(), *part._parameters.values()))
    return held[id(layer)] > 1 or any(held[id(parameter)] > 1 for parameter in layer.parameters())


@torch.no_grad()
def _fold(place: _Place) -> None:
    layer, norm = place.layer, place.norm
    weight, bias = _folded(layer, norm)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ArgumentError(
            f"weights must be finite with {place.path} folded into them; in {weight.dtype} they are not. Train the "
            f"model again if its statistics are not, or call float() on it first."
        )
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
    num_dims = _FOLDABLE[type(layer)][1]
    setattr(place.parent, place.name, FoldedNorm(num_dims).train(norm.training))


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with its norm in them, in the layer's dtype and computed in float32 or better."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale
    if layer.bias is not None:
        bias = bias + layer.bias * scale
    if norm.affine:
        bias = bias + norm.bias
    weight = layer.weight.to(dtype) * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)
