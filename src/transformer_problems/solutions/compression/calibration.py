"""What reaches each linear layer while a model answers sample inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.modes import evaluating
from transformer_problems.core.transforms import matches

Inputs = Tensor | tuple[Tensor, ...]
"""One call's positional arguments."""


@torch.no_grad()
def input_statistic(
    model: nn.Module,
    calibration: Sequence[Inputs],
    add: Callable[[Tensor | None, Tensor], Tensor],
    *,
    skip: Sequence[str] = (),
) -> dict[str, Tensor]:
    """A statistic of the inputs of every nn.Linear, by path, under all its paths if it has several.

    Args:
        calibration: Inputs of the model; it answers them in evaluation mode and is left as it was.
        add: (statistic so far or None, inputs [tokens, I]) -> statistic.
        skip: Patterns of the paths of layers that are not asked about.

    Raises:
        ArgumentError: If there are no inputs, a layer meets none, or one that is not finite.
    """
    if isinstance(calibration, Tensor) or not len(calibration):
        raise ArgumentError("calibration must be a sequence of one or more model inputs, such as [tokens]; got none.")
    asked = {
        path: part
        for path, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, nn.Linear) and not matches(path, skip)
    }
    found: dict[int, Tensor] = {}

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0].detach().flatten(0, -2)
        found[id(layer)] = add(found.get(id(layer)), inputs)

    hooks = [layer.register_forward_pre_hook(note) for layer in dict.fromkeys(asked.values())]
    try:
        with evaluating(model):
            for inputs in calibration:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    for path, layer in asked.items():
        if id(layer) not in found:
            raise ArgumentError(f"calibration must reach every layer; {path} met no input. Pass skip=({path!r},).")
        if not torch.isfinite(found[id(layer)]).all():
            raise ArgumentError(f"calibration must be finite; what reaches {path} is not. Look for NaN in the inputs.")
    return {path: found[id(layer)] for path, layer in asked.items()}


def largest_of_each(so_far: Tensor | None, inputs: Tensor) -> Tensor:
    """A statistic: the largest magnitude of each input over tokens, [I]. inputs: [tokens, I]."""
    largest = inputs.float().abs().amax(dim=0)
    return largest if so_far is None else torch.maximum(so_far, largest)
