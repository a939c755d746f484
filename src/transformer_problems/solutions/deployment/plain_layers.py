"""What may be fused: linear layers that are no more than their weight and bias, and that nothing else holds."""

from collections.abc import Mapping
from typing import TypeGuard

from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.kernels.linear import Linear


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether a layer is weight x + bias and nothing besides: no subclass with more to it, no hooks."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks)


def check_plain(path: str, layers: Mapping[str, object]) -> None:
    """Refuse layers of a module that do more than a fused one would.

    Raises:
        CombinationError: If there is such a layer.
    """
    for name, layer in layers.items():
        if is_plain(layer):
            continue
        what = "has hooks" if type(layer) in (nn.Linear, Linear) else f"is a {type(layer).__name__}"
        raise CombinationError(
            f"{name} of {path or 'the model'} must be a plain torch.nn.Linear to be fused; it {what}. Fuse first and "
            f"treat the model then, or pass skip=({path!r},)."
        )


def check_untied(model: nn.Module, path: str, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse layers whose weights something else holds too, which a fused copy would part from it.

    Raises:
        ArgumentError: If there is such a layer.
    """
    parents = [child for part in model.modules() for child in part._modules.values()]
    owners = [parameter for part in model.modules() for parameter in part._parameters.values()]
    for name, layer in layers.items():
        if sum(child is layer for child in parents) > 1 or sum(weight is layer.weight for weight in owners) > 1:
            raise ArgumentError(
                f"weights must belong to one layer; {name} of {path or 'the model'} shares its own with another. "
                f"Pass skip=({path!r},) or untie them."
            )
