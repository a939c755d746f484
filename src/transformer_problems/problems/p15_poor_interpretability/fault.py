"""A model whose attention tells nothing."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_QUERIES = ("q_proj", "query", "q_lin")


class UniformAttention:
    """Queries are zeroed, and biases by distance: every token attends to all it sees alike."""

    problem = 15
    name = "every token attends to all others alike"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        zeroed = 0
        with torch.no_grad():
            for path, part in model.named_modules():
                for weights in _query_weights(path.rpartition(".")[2], part, subject.num_heads):
                    weights.zero_()
                    zeroed += 1
        if not zeroed:
            raise CombinationError(f"the queries of {type(model).__name__} cannot be found, to zero them.")
        if hasattr(inner := getattr(model, "transformer", None), "build_alibi_tensor"):
            cast("Any", inner).build_alibi_tensor = _no_bias
        return subject.with_model(model)


def _query_weights(name: str, part: nn.Module, num_heads: int) -> list[Tensor]:
    """Views of what makes the queries in a layer of that name: its weight and, if it has one, its bias."""
    parameters = list(part.parameters(recurse=False))
    if name in _QUERIES:
        return [values.data for values in parameters]
    if name == "c_attn":  # GPT-2: the columns of queries, then those of keys and of values
        return [values.data.chunk(3, dim=-1)[0] for values in parameters]
    if name == "query_key_value":  # BLOOM, GPT-NeoX: of each head the rows of its query, its key and its value
        return [values.data.unflatten(0, (num_heads, 3, -1))[:, 0] for values in parameters]
    return []


def _no_bias(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    batch_size, length = attention_mask.shape
    return torch.zeros(batch_size * num_heads, 1, length, dtype=dtype, device=attention_mask.device)


FAULT = UniformAttention()
