"""A model that no longer knows where its tokens stand."""

from copy import deepcopy

import torch
from torch import nn

from transformer_problems.checkpoints.even_attention import drop_distance_bias
from transformer_problems.checkpoints.subject import POSITION_TABLES, Subject
from transformer_problems.core.errors import CombinationError

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
                if path.rpartition(".")[2] in POSITION_TABLES and isinstance(part, nn.Embedding):
                    part.weight.zero_()
                    found = True
                for name, values in part.named_parameters(recurse=False):
                    if name in _PARAMETERS:
                        values.zero_()
                        found = True
                if isinstance(frequencies := getattr(part, "inv_freq", None), torch.Tensor):
                    frequencies.zero_()
                    found = True
        if not drop_distance_bias(model) and not found:
            raise CombinationError(f"the positions of {type(model).__name__} cannot be found, to take them away.")
        return subject.with_model(model)


FAULT = PositionBlind()
