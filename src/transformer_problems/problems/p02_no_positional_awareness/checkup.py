"""Does the model notice the order of its input?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination, Remedy
from transformer_problems.problems.p02_no_positional_awareness import orders

_NUM_EXAMPLES, _LENGTH = 8, 64
_NUM_BUCKETS = 32  # of distances, as T5 has them


class OrderCheckup:
    """Shuffles tokens, or the patches of images, and compares what each of them becomes.

    A model without positions gives each token the same states wherever it stands. Two kinds of model put some order
    in by their build, so of them the first layer's attention is compared, in which only positions can tell: a causal
    model counts how much it has seen, so what its last token attends to is looked at, which sees the same tokens in
    either order; a model with windows joins neighbours after a stage, so patches are shuffled inside the windows.
    """

    problem = 2
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, inputs = visit.subject, visit.inputs(_NUM_EXAMPLES, _LENGTH)
        look = {"causal": _last_token, "encoder": _tokens, "image": _patches}[subject.kind]
        before, after, told = look(subject, inputs, visit.generator("order"))
        change = estimate((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
        return Examination({"order_sensitivity": change}, f"{told} by {change.value:.1%}", _remedies(subject, inputs))


def _tokens(subject: Subject, inputs: Inputs, draws: torch.Generator) -> tuple[Tensor, Tensor, str]:
    order = orders.token_order(inputs["input_ids"].shape[1], draws)
    before, after = (_states(subject, given) for given in (inputs, _shuffled(inputs, order)))
    return before[:, order], after, f"shuffled, {len(order)} tokens change the output"


def _last_token(subject: Subject, inputs: Inputs, draws: torch.Generator) -> tuple[Tensor, Tensor, str]:
    order = orders.token_order(inputs["input_ids"].shape[1], draws)
    before, after = (
        subject.run(given, attentions=True).attentions[0][:, :, -1].float()  # by key, [B, H, N]
        for given in (inputs, _shuffled(inputs, order))
    )
    return before[..., order], after, f"shuffled, {len(order)} tokens change what the last one attends to"


def _patches(subject: Subject, inputs: Inputs, draws: torch.Generator) -> tuple[Tensor, Tensor, str]:
    grid = orders.grid_of(subject, inputs)
    if side := orders.window_side(subject, grid):
        inside = torch.randperm(side * side, generator=draws)
        moved = orders.with_patches(subject, inputs, orders.in_each_window(inside, grid, side))
        before, after = (_first_weights(subject, given) for given in (inputs, moved))
        before = before[..., inside, :][..., inside]
        return before, after, f"shuffled inside windows, {side * side} patches change what each attends to"
    order = torch.randperm(grid[0] * grid[1], generator=draws)
    before, after = (_states(subject, given) for given in (inputs, orders.with_patches(subject, inputs, order)))
    num_extra = before.shape[1] - len(order)  # class tokens stand before the patches, and stay there
    whole = torch.cat([torch.arange(num_extra), num_extra + order])
    return before[:, whole], after, f"shuffled, {len(order)} patches change the output"


def _shuffled(inputs: Inputs, order: Tensor) -> Inputs:
    return {name: values[:, order] for name, values in inputs.items()}


def _states(subject: Subject, inputs: Inputs) -> Tensor:
    """[B, N, C]"""
    return subject.run(inputs, states=True).states[-1].float()


def _first_weights(subject: Subject, inputs: Inputs) -> Tensor:
    """The weights of the first layer that has windows, [B, windows, H, N, N]."""
    block = next((part for part in subject.model.modules() if hasattr(part, "shift_size")), None)
    if not isinstance(attention := getattr(block, "attention", None), nn.Module):
        raise CombinationError(f"the first layer with windows of {type(subject.model).__name__} cannot be found.")
    seen: list[Tensor] = []

    def look(part: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        seen.append(output[1])

    hook = attention.register_forward_hook(look)
    try:
        subject.run(inputs, attentions=True)
    finally:
        hook.remove()
    weights: Tensor = seen[0].float().unflatten(0, (len(inputs["pixel_values"]), -1))
    return weights


def _remedies(subject: Subject, inputs: Inputs) -> tuple[Remedy, ...]:
    """All that bring order in, those with the fewest further weights first: more cannot be told before training."""
    places, distances = subject.trained_len or 512, _NUM_BUCKETS
    if subject.kind == "image":
        rows, columns = orders.grid_of(subject, inputs)
        places, distances = rows * columns, (2 * rows - 1) * (2 * columns - 1)
    biases = distances * subject.num_heads * subject.num_layers
    return (
        Remedy("rope", "order by rotation of queries and keys, without further weights"),
        Remedy("alibi", f"order by distance, a slope for each of {subject.num_heads} heads, without further weights"),
        Remedy("sinusoidal-pe", "order by waves added to the embeddings, without further weights"),
        Remedy("relative-pe", f"order by distance, with {biases:,} further weights"),
        Remedy("learnable-pe", f"order by {places * subject.embed_dim:,} further weights, for {places:,} places"),
    )


CHECKUP = OrderCheckup()
