"""A model whose attention scores have exploded."""

from copy import deepcopy

import torch
from torch import nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_FACTOR = 64.0  # of queries and of keys, so that scores are 4,096 times as large


class ExplodedScores:
    """Queries and keys of the first layer are scaled up."""

    problem = 10
    name = "queries and keys of one layer are 64 times as large"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        with torch.no_grad():
            num_scaled = sum(_scale(path, part, subject) for path, part in _first_projections(model))
        if not num_scaled:
            raise CombinationError(f"queries and keys of {type(model).__name__} cannot be found, to scale them.")
        return subject.with_model(model)


def _first_projections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the first attention layer that makes queries and keys."""
    names = ("q_proj", "k_proj", "query", "key", "c_attn", "query_key_value")
    found = [(path, part) for path, part in model.named_modules() if path.rpartition(".")[2] in names]
    return [(path, part) for path, part in found if path.rpartition(".")[0] == found[0][0].rpartition(".")[0]]


def _scale(path: str, part: nn.Module, subject: Subject) -> bool:
    name = path.rpartition(".")[2]
    for parameter in part.parameters():
        if name == "c_attn":  # GPT-2: queries, keys, values side by side in the last dimension
            parameter[..., : parameter.shape[-1] * 2 // 3].mul_(_FACTOR)
        elif name == "query_key_value":  # Bloom: queries, keys, values of each head in turn
            parameter.view(subject.num_heads, 3, -1)[:, :2].mul_(_FACTOR)
        else:
            parameter.mul_(_FACTOR)
    return True


FAULT = ExplodedScores()
