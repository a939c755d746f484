"""A model that no longer knows where its tokens stand."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_TABLES = ("position_embeddings", "wpe", "embed_positions")
_PARAMETERS = ("position_embeddings", "relative_position_bias_table")  # of ViT and DeiT, and of Swin


class PositionBlind:
    """Position embeddings are zeroed, rotations stand still, and biases by distance are gone."""

    problem = 2
    name = "positions are taken away"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        found = False
        with torch.no_grad():
            for path, part in model.named_modules():
                if path.rpartition(".")[2] in _TABLES and isinstance(part, nn.Embedding):
                    part.weight.zero_()
                    found = True
                for name, values in part.named_parameters(recurse=False):
                    if name in _PARAMETERS:
                        values.zero_()
                        found = True
                if isinstance(frequencies := getattr(part, "inv_freq", None), torch.Tensor):
                    frequencies.zero_()
                    found = True
        if hasattr(inner := getattr(model, "transformer", None), "build_alibi_tensor"):
            cast("Any", inner).build_alibi_tensor = _no_bias
            found = True
        if not found:
            raise CombinationError(f"the positions of {type(model).__name__} cannot be found, to take them away.")
        return subject.with_model(model)


def _no_bias(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    batch_size, length = attention_mask.shape
    return torch.zeros(batch_size * num_heads, 1, length, dtype=dtype, device=attention_mask.device)


FAULT = PositionBlind()
