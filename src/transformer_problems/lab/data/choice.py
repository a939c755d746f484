"""Which examples are learned from: few ones chosen evenly over classes, and the batch of a step."""

import torch
from torch import Tensor

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


def draw_batch(num: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Which of `num` examples make the batch of a step: each at most once, if there are as many."""
    draws = generator(seed, "batch", step)
    if num < batch_size:
        return torch.randint(num, (batch_size,), generator=draws)
    return torch.randperm(num, generator=draws)[:batch_size]
