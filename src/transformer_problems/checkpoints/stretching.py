"""A model whose context was stretched: the same weights, more places."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import POSITION_TABLES, Subject
from transformer_problems.core.errors import CombinationError

_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length")
_OF_PLACES = ("position_ids", "token_type_ids")  # buffers that hold a row for each place
_ROTATIONS = ("inv_freq", "original_inv_freq")


def stretched(subject: Subject, factor: int) -> Subject:
    """A copy that takes inputs `factor` times as long; of a model of images, sides that are that root longer.

    Tables of positions are interpolated, rotations slowed down as much (Chen et al. 2023, arXiv:2306.15595); distances
    need nothing.

    Args:
        factor: Of a model of images a square, such as 16.

    Raises:
        CombinationError: If the model looks at windows, whatever the size of the image, or its places are not found.
    """
    model = deepcopy(subject.model)
    grow = _stretch_images if subject.kind == "image" else _stretch_texts
    with torch.no_grad():
        grow(model, cast("Any", model).config, factor)
    return subject.with_model(model)


def _stretch_texts(model: nn.Module, config: Any, factor: int) -> None:
    found = config.model_type == "bloom"  # it counts distances
    for path, part in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in POSITION_TABLES and isinstance(part, nn.Embedding):
            _stretch_table(part, factor)
            found = True
        for name in _ROTATIONS:
            if isinstance(frequencies := getattr(part, name, None), Tensor):
                frequencies.div_(factor)
                found = True
        for name in _OF_PLACES:
            places = getattr(part, name, None)
            if isinstance(places, Tensor) and places.ndim == 2:
                longer = torch.arange(factor * places.shape[1], device=places.device)[None]
                setattr(part, name, longer if name == "position_ids" else torch.zeros_like(longer))
    if not found:
        raise CombinationError(f"the places of {type(model).__name__} cannot be found, to stretch them.")
    declared = {name: length for name in _LENGTHS if isinstance(length := getattr(config, name, None), int)}
    for name, length in declared.items():  # read before any is set: some are two names of one
        setattr(config, name, factor * length)


def _stretch_table(table: nn.Embedding, factor: int) -> None:
    """Rows before the first place, as those of padding, stay."""
    before = 2 if hasattr(table, "offset") else 0 if table.padding_idx is None else table.padding_idx + 1
    places = table.weight[before:]  # [N, C]
    longer = nn.functional.interpolate(places.mT[None].float(), size=factor * len(places), mode="linear")[0].mT
    table.weight = nn.Parameter(torch.cat([table.weight[:before], longer.to(places.dtype)]))
    table.num_embeddings = len(table.weight)


def _stretch_images(model: nn.Module, config: Any, factor: int) -> None:
    if getattr(config, "window_size", None) is not None:
        raise CombinationError(f"{type(model).__name__} looks at windows: its cost is linear at any size.")
    sides = round(factor**0.5)
    side = sides * config.image_size
    config.image_size = side
    for part in model.modules():
        if isinstance(getattr(part, "image_size", None), tuple | int):
            cast("Any", part).image_size = (side, side)
            cast("Any", part).num_patches = (side // config.patch_size) ** 2
        table = getattr(part, "position_embeddings", None)
        if isinstance(table, nn.Parameter):
            part.position_embeddings = nn.Parameter(_stretch_map(table, sides))


def _stretch_map(table: Tensor, sides: int) -> Tensor:
    """Table: [1, special + n n, C]; the special places stay."""
    side = int((table.shape[1]) ** 0.5)
    special = table.shape[1] - side**2
    square = table[:, special:].mT.unflatten(2, (side, side)).float()  # [1, C, n, n]
    larger = nn.functional.interpolate(square, scale_factor=sides, mode="bicubic").flatten(2).mT
    return torch.cat([table[:, :special], larger.to(table.dtype)], dim=1)
