"""A model whose attention looks everywhere alike, and one that has learned to look nearby."""

import torch
from torch import Tensor

from transformer_problems.checkpoints.attention_bias import Bias, with_attention_bias, without_attention_bias
from transformer_problems.checkpoints.even_attention import drop_distance_bias, zero_queries
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.seeding import generator

_FEWER = 4  # an image is fewer patches wide than a text is tokens long


class BlindToPlace:
    """Queries are zeroed, so that all scores are zero, and biases by distance are gone."""

    problem = 5
    name = "attention looks everywhere alike"
    preparation = "half of the heads are first given a slope by distance, for small models hardly learn to look nearby"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if getattr(subject.config, "window_size", None) is not None:
            raise CombinationError(f"{subject.name} looks inside windows, which are local whatever its weights are.")
        model = without_attention_bias(subject).model
        if not zero_queries(model, subject.num_heads):
            raise CombinationError(f"the queries of {type(model).__name__} cannot be found, to zero them.")
        drop_distance_bias(model)
        return subject.with_model(model)

    def prepare(self, subject: Subject, seed: int) -> Subject:
        """A healthy copy that looks nearby, as large data teach: small models are trained too briefly to learn it.

        In every layer half of the heads have a slope by distance, drawn from those of Press et al. 2022,
        arXiv:2108.12409.
        """
        draws = generator(seed, "local heads")
        return with_attention_bias(subject, [_slopes(subject, draws) for _ in range(subject.num_layers)])


def _slopes(subject: Subject, draws: torch.Generator) -> Bias:
    slopes = 2 ** -(1 + 3 * torch.rand(subject.num_heads, 1, 1, generator=draws))  # from 1/2 to 1/16
    slopes[subject.num_heads // 2 :] = 0  # half of the heads look as they did

    def near(before: Tensor) -> Tensor:
        if subject.kind != "image":
            return -slopes.to(before.device) * before.abs()
        num = before.shape[-1]
        side = int(num**0.5)
        places = torch.arange(num, device=before.device) - (num - side * side)  # class tokens come first, of no place
        apart = torch.stack([places // side, places % side], dim=1).float()
        far = torch.cdist(apart, apart).masked_fill((places < 0) | (places < 0)[:, None], 0)
        return -_FEWER * slopes.to(before.device) * far

    return near


FAULT = BlindToPlace()
