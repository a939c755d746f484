"""Heads found by patching, and what becomes of the answers without them: does what was found cause the answer?"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transformer_problems.core.seeding import generator
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p15_poor_interpretability.explanations import READ_AT, answer_logits
from transformer_problems.problems.p15_poor_interpretability.planted import Planted
from transformer_problems.solutions.interpretability.activation_patching import activation_patching
from transformer_problems.solutions.interpretability.head_ablation import ablate_heads
from transformer_problems.solutions.interpretability.sites import Site, attention_layers

SHARE = 0.25  # of all heads that are found and ablated
_DRAWS = 8  # of as many other heads


def heads_by_effect(model: Encoder, known: Planted) -> list[Site]:
    """All heads, first those that take most of the answer away where they say what they say in a text without evidence.

    Only what a head gives to the answer's position is patched; what it moves between other tokens stays.
    """
    heads = [Site(path, head) for path, layer in attention_layers(model).items() for head in range(layer.num_heads)]

    def metric(logits: Tensor) -> Tensor:
        return _probability_of(logits, known).mean()

    # Texts without evidence are patched into those with it: the question is what is needed, not what is enough.
    found = activation_patching(model, known.other_text, known.tokens, metric, heads, positions=[READ_AT])
    order = found.restored[:, 0].argsort(descending=True, stable=True)
    return [found.sites[i] for i in order.tolist()]


def ablation_losses(model: Encoder, planted: Planted, known: Planted) -> tuple[Tensor, Tensor]:
    """What the answer's probability loses without the found heads, and without as many others, [B] each.

    Heads are put at their mean over the known examples. Losses without others are the mean over several draws.
    """
    heads = heads_by_effect(model, known)
    num = max(1, round(SHARE * len(heads)))
    whole = _probability(model, planted)

    def loss(ablated: Sequence[Site]) -> Tensor:
        with ablate_heads(model, ablated, mean_over=known.tokens):
            return whole - _probability(model, planted)

    others = torch.stack([loss(drawn) for drawn in _drawn(heads[num:], num)])
    return loss(heads[:num]), others.mean(dim=0)


def _drawn(heads: Sequence[Site], num: int) -> Iterator[list[Site]]:
    draws = generator(0, "other heads")
    for _ in range(_DRAWS):
        yield [heads[i] for i in torch.randperm(len(heads), generator=draws)[:num].tolist()]


@torch.no_grad()
def _probability(model: Encoder, planted: Planted) -> Tensor:
    return _probability_of(model(planted.tokens), planted)


def _probability_of(logits: Tensor, planted: Planted) -> Tensor:
    """Of the right classes, [B]."""
    return answer_logits(logits.softmax(dim=-1), planted.answers)
