"""Where a forward pass first leaves the finite numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite_layer(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the module whose output is the first with a number that is not finite; None where all are.

    Of nested modules the innermost is named, because it finishes first. An input or a parameter that is not finite
    shows in the first module that reads it. Afterwards the model's buffers, such as running means, and PyTorch's random
    state are as before; dropout in this pass draws other numbers than it drew in an earlier one.

    Args:
        run: Runs the model's forward pass; it gets no gradients.

    Example:
        >>> import torch
        >>> from transformer_problems import first_nonfinite_layer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> _ = torch.nn.init.constant_(model[2].weight, float("inf"))
        >>> first_nonfinite_layer(model, lambda: model(torch.ones(2, 4)))
        '2'
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not bool(torch.isfinite(part).all()) for part in _floats(output)):
                found.append(name or type(module).__name__)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad():
        try:
            with torch.random.fork_rng():
                run()
        finally:
            for hook in hooks:
                hook.remove()
            for buffer, before in buffers:
                buffer.copy_(before)
    return found[0] if found else None


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in tuples and mappings too."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _floats(part)]
