"""int8 in the place of a checkpoint's linear layers."""

from typing import Any, cast

import torch
from torch import nn

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.treatment import Treated
from transformer_problems.core.errors import CombinationError
from transformer_problems.solutions.compression.int8 import QuantizeInt8

_TRIED = 16  # tokens of the pass that shows whether the layers are called


class Quantization:
    """Rounds weights and inputs of every linear layer to int8, but for the head and what shares its weights.

    Weights have a scale for each output, inputs one for each token's row, found as it comes (dynamic): no calibration.
    """

    solution = "quantization"
    claims = (13, 18)

    def refusal(self, subject: Subject) -> str | None:
        parts = list(subject.model.modules())
        if subject.holds_codes:
            return "its weights are codes already. Start from the float checkpoint."
        if not _rounded(subject.model):
            conv = " but Conv1D, GPT-2's own," if any(type(part).__name__ == "Conv1D" for part in parts) else ""
            return f"its layers are no torch.nn.Linear{conv} which are all that int8 is put in the place of."
        return None

    @torch.no_grad()
    def apply(self, visit: Visit) -> Treated:
        subject = visit.subject
        rounded = _rounded(subject.model)
        skip = tuple(
            path
            for path, part in subject.model.named_modules(remove_duplicate=False)
            if isinstance(part, nn.Linear) and path not in rounded
        )
        model = QuantizeInt8(skip=skip)(subject.model)
        treated = subject.with_model(model)
        try:
            treated.run(visit.inputs(1, _TRIED))
        except AttributeError as error:
            raise CombinationError(
                f"quantization cannot be applied to {subject.name}: {type(model).__name__} reads the weights of its "
                f"linear layers and does not call them ({error})."
            ) from error
        settings = {
            "weights": "int8, a scale for each output",
            "inputs": "int8, a scale for each row, found as it comes",
            "layers": len(rounded),
            "left_in_floats": list(skip),
            "why": f"a head, and weights that two parts share, stay in floats: {len(skip)} here",
        }
        return Treated(treated, settings, skip)


def _rounded(model: nn.Module) -> set[str]:
    """Paths of the linear layers below the head whose weights are theirs alone."""
    body = cast("Any", model).base_model
    inside = {id(part) for part in body.modules()}
    held: dict[int, set[int]] = {}
    for part in model.modules():
        for weight in part.parameters(recurse=False):
            held.setdefault(id(weight), set()).add(id(part))
    return {
        path
        for path, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, nn.Linear) and id(part) in inside and len(held[id(part.weight)]) == 1
    }
