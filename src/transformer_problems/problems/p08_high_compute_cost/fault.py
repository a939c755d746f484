"""A model half of which does nothing."""

from copy import deepcopy

import torch

from transformer_problems.checkpoints.lengths import longest_input
from transformer_problems.checkpoints.subject import Inputs, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.seeding import generator
from transformer_problems.problems.p08_high_compute_cost.blocks import Product, blocks_of, products_of


class HalfIdle:
    """Half of the neurons and half of the heads of each layer give nothing, and are computed all the same."""

    problem = 8
    name = "half of the neurons and heads are zero"

    def plant(self, subject: Subject, seed: int) -> Subject:
        ill = subject.with_model(deepcopy(subject.model))
        done = set()
        for block in blocks_of(ill, products_of(ill, _any_input(ill))):
            for products, parts in ((block.attention, block.num_heads), (block.feed_forward, None)):
                if products and products[-1].path not in done:
                    done.add(products[-1].path)
                    _silence(products[-1], parts, generator(seed, "idle", products[-1].path))
        if not done:
            raise CombinationError(f"{type(subject.model).__name__} has no neurons or heads to silence.")
        return ill


@torch.no_grad()
def _silence(last: Product, num_parts: int | None, draws: torch.Generator) -> None:
    matrix = last.matrix
    parts = matrix.shape[1] if num_parts is None else num_parts
    chosen = torch.randperm(parts, generator=draws)[: parts // 2]
    matrix.unflatten(1, (parts, -1))[:, chosen] = 0


def _any_input(subject: Subject) -> Inputs:
    if subject.kind == "image":
        size = subject.config.image_size
        sides = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(subject.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, *sides, dtype=subject.dtype, device=subject.device)}
    tokens = torch.arange(min(8, longest_input(subject)), device=subject.device)[None]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


FAULT = HalfIdle()
