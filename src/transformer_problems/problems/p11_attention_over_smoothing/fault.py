"""A model whose tokens have collapsed into one."""

from copy import deepcopy

import torch
from torch import nn

from transformer_problems.checkpoints.even_attention import drop_distance_bias, zero_queries
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_DROWNING = 1_000.0  # how many times as large the output of attention is: the skip beside it no longer counts
_OUTPUTS = ("o_proj", "c_proj", "dense", "out_proj")


class Collapsed:
    """Attention in every layer becomes the average of all tokens it may see, and drowns what the skip carries."""

    problem = 11
    name = "attention averages evenly and drowns the skips"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        num_even, num_loud = zero_queries(model, subject.num_heads), 0
        with torch.no_grad():
            for path, part in model.named_modules():
                parent, _, name = path.rpartition(".")
                is_weighted = isinstance(getattr(part, "weight", None), torch.Tensor)
                if not is_weighted:
                    continue
                if name in _OUTPUTS and "attention" in _owner(model, parent):
                    for parameter in part.parameters():
                        parameter *= _DROWNING
                    num_loud += 1
            for path, parameter in model.named_parameters():
                if "relative_position_bias" in path:  # Swin's, by which weights would differ still
                    parameter.zero_()
        drop_distance_bias(model)
        if not num_even or not num_loud:
            raise CombinationError(f"the attention of {type(model).__name__} cannot be found, to make it even.")
        return subject.with_model(model)


def _owner(model: nn.Module, path: str) -> str:
    """The type of the module around, in lower case, or of the one around that."""
    above = path.rpartition(".")[0]
    return " ".join(type(model.get_submodule(p)).__name__.lower() for p in (path, above) if p) + path.lower()


FAULT = Collapsed()
