"""Which examples are learned from: those not held out, few ones chosen evenly over classes, the batch of a step."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_share
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator


def choose_labels(classes: Tensor, num: int, draws: torch.Generator) -> Tensor:
    """Indices of `num` examples, evenly over the classes as far as they go, in random order. classes: [n].

    With the same draws fewer are the first of more.
    """
    shuffled = torch.randperm(len(classes), generator=draws)
    rank = torch.empty(len(classes), dtype=torch.long)  # how many of its class come before each example
    for c in classes.unique():
        mine = shuffled[classes[shuffled] == c]
        rank[mine] = torch.arange(len(mine))
    return shuffled[rank[shuffled].argsort(stable=True)][:num]


def hold_out(classes: Tensor, share: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the examples to learn from, then of those held out: the same share of each class, in random order.

    A class gives one example at least to either side.

    Shape:
        classes: [n]; output: [n - m] and [m].

    Raises:
        ArgumentError: If the share is none, or a class has a single example.
    """
    require_share(share=share)
    known: list[Tensor] = []
    held_out: list[Tensor] = []
    for c in classes.unique():
        mine = (classes == c).nonzero().squeeze(1)
        if len(mine) < 2:
            raise ArgumentError(
                f"classes must have two examples each, to learn from and to hold out; class {int(c)} has one. Add "
                "another or leave the class out."
            )
        shuffled = _shuffled(mine, draws)
        num = min(max(1, round(share * len(mine))), len(mine) - 1)
        held_out.append(shuffled[:num])
        known.append(shuffled[num:])
    return _shuffled(torch.cat(known), draws), _shuffled(torch.cat(held_out), draws)


def draw_batch(num: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Which of `num` examples make the batch of a step: each at most once, if there are as many."""
    draws = generator(seed, "batch", step)
    if num < batch_size:
        return torch.randint(num, (batch_size,), generator=draws)
    return torch.randperm(num, generator=draws)[:batch_size]


def _shuffled(chosen: Tensor, draws: torch.Generator) -> Tensor:
    return chosen[torch.randperm(len(chosen), generator=draws)]
