"""A model that sees only what stands right before."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_SHARE = 16


class NearSighted:
    """Every layer's attention sees a sixteenth of the window, so that layers together see some more."""

    problem = 3
    name = "attention is cut to a sixteenth of the window in every layer"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.trained_len is None:
            raise CombinationError(f"{subject.name} has no window of tokens, to cut it.")
        return with_window(subject, max(2, subject.trained_len // _SHARE))


def with_window(subject: Subject, window_size: int) -> Subject:
    """A copy whose tokens see no others from `window_size` tokens away on.

    Raises:
        CombinationError: If no part of it takes a mask, so that none can be put in.
    """
    model = deepcopy(subject.model)
    masked = [part for part in model.modules() if "attention_mask" in inspect.signature(part.forward).parameters]
    innermost = [part for part in masked if not any(inner in masked for inner in _below(part))]
    if not innermost or model in innermost:
        raise CombinationError(f"the attention of {type(model).__name__} takes no mask, to cut it.")
    for part in innermost:
        part.register_forward_pre_hook(_narrowed(window_size, subject.kind == "causal"), with_kwargs=True)
    return subject.with_model(model)


def _below(part: nn.Module) -> list[nn.Module]:
    return list(part.modules())[1:]


def _narrowed(window_size: int, is_causal: bool) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = inspect.signature(part.forward).bind(*args, **kwargs)
        states, mask = call.arguments["hidden_states"], call.arguments.get("attention_mask")
        num_queries, num_keys = mask.shape[-2:] if mask is not None else (states.shape[1], states.shape[1])
        queries = torch.arange(num_keys - num_queries, num_keys, device=states.device)[:, None]
        apart = queries - torch.arange(num_keys, device=states.device)
        far = (apart >= window_size) | (apart < 0 if is_causal else -apart >= window_size)
        call.arguments["attention_mask"] = _without(far, mask, states)
        return call.args, call.kwargs

    return hook


def _without(far: Tensor, mask: Tensor | None, states: Tensor) -> Tensor:
    if mask is None:
        return ~far.expand(len(states), 1, *far.shape)
    if mask.dtype == torch.bool:
        return mask & ~far
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


FAULT = NearSighted()
