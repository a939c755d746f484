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

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") == "softmax" and isinstance(args[0], Tensor) and args[0].dim() >= 3:
            scores = args[0].detach().reshape(self.num_examples, -1)
            self.largest.append(scores.amax(dim=1).float().clamp(max=torch.finfo(torch.float32).max))
        return function(*args, **(kwargs or {}))
