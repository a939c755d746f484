"""What a training monitor knows of layers: which modules they are, and what a sample showed of each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from transformer_problems.core.errors import ArgumentError

_COLUMNS = {
    "gradient_norm": "gradient",
    "update_ratio": "update/weights",
    "largest_logit": "largest logit",
    "attention_entropy": "entropy (nats)",
    "attention_entropy_share": "entropy (share)",
    "token_similarity": "token similarity",
}


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one sampled step showed of one layer; None where there is none, as no attention in a convolution.

    Args:
        step: Optimizer steps done before this one.
        layer: The layer's name in the model.
        gradient_norm: Norm of the gradient of the layer's trained parameters, as the optimizer was given it.
        update_ratio: Norm of what the step changed in these parameters, over the norm of all of the layer's before it,
            frozen ones too: biases or adapters that start at zero may change by many times their own norm in health.
        largest_logit: Largest |q k^T| * scale before the softmax, over the keys that a query may see.
        attention_entropy: Mean entropy of the attention weights, in nats.
        attention_entropy_share: The same as a share of its maximum, the log of the number of keys that may be seen.
        token_similarity: Mean cosine between different tokens of an example in the layer's output, where it has tokens.
    """

    step: int
    layer: str
    gradient_norm: float | None
    update_ratio: float | None
    largest_logit: float | None
    attention_entropy: float | None
    attention_entropy_share: float | None
    token_similarity: float | None


def longest_stack(model: nn.Module) -> dict[str, nn.Module]:
    """The entries, by name, of the longest ModuleList or Sequential of equal types.

    One inside another with several entries does not count, so that the experts of one layer are not taken for layers.

    Raises:
        ArgumentError: If the model has none.
    """
    stacks = {name: list(module.children()) for name, module in model.named_modules() if _is_stack(module)}
    outer = [
        name
        for name in stacks
        if not any(len(stacks[other]) > 1 and name != other and _lies_in(name, other) for other in stacks)
    ]
    if not outer:
        raise ArgumentError(
            f"model must have a ModuleList, or a Sequential of equal types, of layers; {type(model).__name__} has "
            "none. Pass layers=[...], from first to last."
        )
    return named_layers(model, stacks[max(outer, key=lambda name: len(stacks[name]))])


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    if isinstance(module, nn.Sequential):
        return len({type(child) for child in children}) == 1
    return isinstance(module, nn.ModuleList) and len(children) > 0


def _lies_in(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")


def named_layers(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Layers by their names in the model.

    Raises:
        ArgumentError: If there are none, or one is no module of the model.
    """
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    listed = list(layers)
    for layer in listed:
        if id(layer) not in names:
            raise ArgumentError(
                f"layers must be modules of the model; got a {type(layer).__name__} that is none. "
                "Pass the modules themselves, e.g. layers=[model.get_submodule(name) for name in names]."
            )
    if not listed:
        raise ArgumentError("layers must hold at least one module; got none. Leave it out for the model's own stack.")
    return {names[id(layer)]: layer for layer in listed}


def table(records: Sequence[LayerRecord]) -> list[str]:
    """The lines of an aligned table of records, one a row."""
    rows = [["layer", *_COLUMNS.values()]]
    for record in records:
        figures = (getattr(record, column) for column in _COLUMNS)
        rows.append([record.layer, *("-" if figure is None else f"{figure:.3g}" for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
