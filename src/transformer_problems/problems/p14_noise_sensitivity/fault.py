"""A model that takes padding for text."""

import inspect
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError


class MaskIgnored:
    """The attention mask is replaced by ones on its way in."""

    problem = 14
    name = "the attention mask is ignored"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        body = cast("Any", model).base_model
        if subject.kind == "image" or "attention_mask" not in inspect.signature(body.forward).parameters:
            raise CombinationError(f"{type(model).__name__} is given no mask of padding, to ignore it.")
        body.register_forward_pre_hook(_unmasked, with_kwargs=True)
        return subject.with_model(model)


def _unmasked(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = inspect.signature(part.forward).bind(*args, **kwargs)
    mask = call.arguments.get("attention_mask")
    if mask is not None:
        call.arguments["attention_mask"] = torch.ones_like(mask)
    return call.args, call.kwargs


FAULT = MaskIgnored()
