"""A model that takes many tokens for what one could hold."""

from copy import deepcopy
from typing import Any

from torch import nn
from torch.nn.functional import interpolate

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError


class Enlarged:
    """Every image is read at a quarter of its resolution, enlarged: sixteen times the tokens that its content needs."""

    problem = 16
    name = "images are read at a quarter of their resolution, with as many tokens"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.kind != "image":
            raise CombinationError(f"{subject.name} reads no images, so there is no resolution to take away.")
        model = deepcopy(subject.model)
        model.register_forward_pre_hook(_blur, with_kwargs=True)
        return subject.with_model(model)


def _blur(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = kwargs["pixel_values"]
    small = interpolate(pixels, scale_factor=0.25, mode="bilinear", antialias=True)
    return args, {**kwargs, "pixel_values": interpolate(small, pixels.shape[2:], mode="bilinear")}


FAULT = Enlarged()
