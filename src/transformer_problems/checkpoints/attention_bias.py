"""Puts a bias on the attention scores of any transformers model, in a copy of it."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

Bias = Callable[[Tensor], Tensor]
"""From how far each key stands before its query, [N, M] (negative after it), to what is added, [N, M] or [H, N, M]."""


def with_attention_bias(subject: Subject, biases: list[Bias]) -> Subject:
    """A copy in which something is added to the scores of each layer before its softmax.

    Args:
        biases: One for each layer that computes attention, in their order; the last stands for all that follow, as
            where layers share one module.

    Raises:
        CombinationError: If no part of the model takes a mask, through which a bias could be put in.
    """
    model = deepcopy(subject.model)
    masked = [part for part in model.modules() if "attention_mask" in inspect.signature(part.forward).parameters]
    innermost = [part for part in masked if not any(inner in masked for inner in list(part.modules())[1:])]
    if not innermost or innermost[0] is model:
        raise CombinationError(f"the attention of {type(model).__name__} takes no mask, so no bias can be put in.")
    for number, part in enumerate(innermost):
        hook = _Adding(biases[min(number, len(biases) - 1)], is_causal=subject.kind == "causal")
        part.register_forward_pre_hook(hook, with_kwargs=True)
    return subject.with_model(model)


def without_attention_bias(subject: Subject) -> Subject:
    """A copy in which nothing of what `with_attention_bias` put in is left."""
    model = deepcopy(subject.model)
    for part in model.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, _Adding):
                del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
    return subject.with_model(model)


@dataclass(frozen=True)
class _Adding:
    """A hook before a layer's attention, which adds to its mask."""

    bias: Bias
    is_causal: bool

    def __call__(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = inspect.signature(part.forward).bind(*args, **kwargs)
        states, mask = call.arguments["hidden_states"], call.arguments.get("attention_mask")
        num_queries, num_keys = mask.shape[-2:] if mask is not None else (states.shape[1], states.shape[1])
        queries = torch.arange(num_keys - num_queries, num_keys, device=states.device)[:, None]
        before = queries - torch.arange(num_keys, device=states.device)
        lowest = torch.finfo(states.dtype).min
        added = self.bias(before).to(states.dtype)
        if mask is None and self.is_causal:  # the attention would have left out what comes later by itself
            mask = before >= 0
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask <= lowest
            added = added.masked_fill(hidden, lowest)
        call.arguments["attention_mask"] = added.clamp_min(lowest)[(None,) * (4 - added.dim())]
        return call.args, call.kwargs
