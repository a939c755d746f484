"""The scores of attention before their softmax, of any model that computes them in the open."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ScoresSeen(TorchFunctionMode):
    """While open, notes the largest score of each example in every softmax over keys.

    Where a model adds biases by distance to its scores they count, as the softmax sees them too; what masks add is
    below zero and does not.

    Args:
        num_examples: B; windows of one image count as one example.
    """

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        self.num_examples = num_examples
        self.largest: list[Tensor] = []  # of each layer, [B]
        self._before: Tensor | None = None  # what a model takes off its scores itself, so that the largest is 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        is_max = name == "max" and isinstance(args[0], Tensor) and args[0].dim() == 4
        if is_max or (name == "softmax" and isinstance(args[0], Tensor) and args[0].dim() >= 3):
            scores = args[0].detach().reshape(self.num_examples, -1)
            largest = scores.amax(dim=1).float().clamp(max=torch.finfo(torch.float32).max)
            if is_max:
                self._before = largest
            else:
                self.largest.append(largest if largest.any() or self._before is None else self._before)
                self._before = None
        return function(*args, **(kwargs or {}))
