"""Takes away what makes one token's attention differ from another's: queries, and biases by distance."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

_QUERIES = ("q_proj", "query", "q_lin")


@torch.no_grad()
def zero_queries(model: nn.Module, num_heads: int) -> int:
    """Zero the queries of every layer in place, so that all scores are zero; how many tensors that were."""
    views = [view for path, part in model.named_modules() for view in _query_weights(path, part, num_heads)]
    for view in views:
        view.zero_()
    return len(views)


def drop_distance_bias(model: nn.Module) -> bool:
    """Let BLOOM's bias by distance be zero from now on; whether the model has one."""
    inner: Any = getattr(model, "transformer", None)
    if not hasattr(inner, "build_alibi_tensor"):
        return False
    inner.build_alibi_tensor = _no_bias
    return True


def _query_weights(path: str, part: nn.Module, num_heads: int) -> Iterator[Tensor]:
    """Views of what makes the queries in a layer of that name: its weight and, if it has one, its bias."""
    name = path.rpartition(".")[2]
    for values in part.parameters(recurse=False):
        if name in _QUERIES:
            yield values
        elif name == "c_attn":  # GPT-2: the columns of queries, then those of keys and of values
            yield values.chunk(3, dim=-1)[0]
        elif name == "query_key_value":  # BLOOM, GPT-NeoX: of each head the rows of its query, its key and its value
            yield cast("Tensor", values.unflatten(0, (num_heads, 3, -1)))[:, 0]


def _no_bias(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    batch_size, length = attention_mask.shape
    return torch.zeros(batch_size * num_heads, 1, length, dtype=dtype, device=attention_mask.device)
