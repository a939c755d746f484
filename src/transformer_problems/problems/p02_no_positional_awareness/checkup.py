"""Does the model notice the order of its input?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.findings import Examination, Remedy

_NUM_TEXTS, _LENGTH = 8, 64


class OrderCheckup:
    """Shuffles the tokens between the first and the last, and compares what each of them becomes.

    An encoder without positions gives each token the same states wherever it stands. A causal model without them
    still counts how much it has seen, so of it the first layer's attention of the last token is compared, which
    sees the same tokens in either order.
    """

    problem = 2
    not_for: Mapping[Kind, str] = {"image": "an image's patches are not a sequence: their places are checked in 05"}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        inputs = visit.inputs(_NUM_TEXTS, _LENGTH)
        length = inputs["input_ids"].shape[1]
        order = torch.arange(length)
        order[1:-1] = 1 + torch.randperm(length - 2, generator=visit.generator("order"))
        shuffled: Inputs = {name: values[:, order] for name, values in inputs.items()}
        see = _last_attention if visit.subject.kind == "causal" else _states
        before, after = see(visit.subject, inputs)[:, order], see(visit.subject, shuffled)
        changes = ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).double()
        change = estimate(changes)
        told = f"shuffled, {length} tokens change {'attention' if visit.subject.kind == 'causal' else 'the output'}"
        return Examination({"order_sensitivity": change}, f"{told} by {change.value:.0%}", _remedies(visit.subject))


def _states(subject: Subject, inputs: Inputs) -> Tensor:
    """[B, N, C]"""
    return subject.run(inputs, states=True).states[-1].float()


def _last_attention(subject: Subject, inputs: Inputs) -> Tensor:
    """What the last token attends to in the first layer, by key, [B, N, H]."""
    return subject.run(inputs, attentions=True).attentions[0][:, :, -1].mT.float()


def _remedies(subject: Subject) -> tuple[Remedy, ...]:
    if subject.kind == "causal":
        return (Remedy("rope", "order by rotation, no further weights", 2), Remedy("alibi", "order by distance", 1))
    rows = subject.trained_len or 512
    weights = rows * subject.embed_dim
    return (
        Remedy("rope", "order by rotation, no further weights", 3),
        Remedy("relative-pe", "order by distance, a bias for each head", 2),
        Remedy("learnable-pe", f"order by {weights:,} further weights for {rows:,} places", 1),
    )


CHECKUP = OrderCheckup()
