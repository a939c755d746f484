"""A model that hands the machine its work in crumbs."""

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_PIECES = 16


class Crumbled:
    """Every linear layer of a layer's computes its outputs a sixteenth at a time, and joins them: the same numbers."""

    problem = 17
    name = f"linear layers are computed in {_PIECES} pieces each, one after the other"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        found = 0
        for part in list(model.modules()):
            for name, child in part.named_children():
                if _is_linear(child) and _width(child) >= _PIECES:
                    setattr(part, name, InPieces(child))
                    found += 1
        if not found:
            raise CombinationError(f"{type(model).__name__} has no linear layers that could be computed in pieces.")
        return subject.with_model(model)


class InPieces(nn.Module):
    """A linear layer whose outputs are computed in pieces.

    Shape:
        x: [..., in]; output: [..., out].
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = cast("nn.Parameter", whole.weight), cast("nn.Parameter | None", whole.bias)
        self.columns_last = not isinstance(whole, nn.Linear)  # GPT-2's Conv1D holds its weight as [in, out]

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.weight.T if self.columns_last else self.weight).chunk(_PIECES)
        biases = [None] * len(rows) if self.bias is None else self.bias.chunk(_PIECES)
        return torch.cat([nn.functional.linear(x, w, b) for w, b in zip(rows, biases, strict=True)], dim=-1)


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear or type(part).__name__ == "Conv1D"


def _width(part: nn.Module) -> int:
    return cast("nn.Parameter", part.weight).shape[0 if isinstance(part, nn.Linear) else 1]


FAULT = Crumbled()
