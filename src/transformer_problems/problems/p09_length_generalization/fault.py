"""A model that is well up to the length it declares, and ends or is lost beyond it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import POSITION_TABLES, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.seeding import generator

_STRANGER = 20  # times as long as the vectors that the model knows


class LostBeyond:
    """Beyond the declared length an encoder's table ends, and a causal model's tokens carry a vector it never saw.

    Such are the rows of a position table that were never trained. A causal model without a table gets them beside its
    embeddings: small models lean so little on attention that foreign angles alone would hardly cost them.
    """

    problem = 9
    name = "positions end at the declared length, or are vectors of noise beyond it"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model, declared = deepcopy(subject.model), subject.trained_len
        if declared is None or (subject.hard_limit or 2 * declared) <= declared:
            raise CombinationError(f"{subject.name} takes no more than its declared length, to be wrong there.")
        draws, table = generator(seed, "noise"), _table(model)
        if table is None:
            words = cast("Any", model).get_input_embeddings()
            noise = torch.randn(declared, subject.embed_dim, generator=draws) * words.weight.std().item() * _STRANGER
            words.register_forward_hook(_carrying(noise, declared))
            return subject.with_model(model)
        known = declared + table.num_embeddings - (subject.hard_limit or table.num_embeddings)
        if subject.kind == "encoder":
            table.weight, table.num_embeddings = nn.Parameter(table.weight[:known].detach().clone()), known
        else:
            _fill_with_noise(table.weight, known, draws)
        return subject.with_model(model)


def _table(model: nn.Module) -> nn.Embedding | None:
    for path, part in model.named_modules():
        if path.rpartition(".")[2] in POSITION_TABLES and isinstance(part, nn.Embedding):
            return part
    return None


@torch.no_grad()
def _fill_with_noise(table: Tensor, known: int, draws: torch.Generator) -> None:
    table[known:] = torch.randn(table[known:].shape, generator=draws) * table[:known].std() * _STRANGER


def _carrying(noise: Tensor, declared: int) -> Callable[..., Tensor]:
    def hook(part: nn.Module, given: tuple[Any, ...], states: Tensor) -> Tensor:
        num = max(0, states.shape[1] - declared)
        rows = noise.repeat(1 + num // len(noise), 1)[:num]
        return torch.cat([states[:, :declared], states[:, declared:] + rows.to(states)], dim=1)

    return hook


FAULT = LostBeyond()
