"""What was done to a checkpoint, as it is kept beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One solution that was applied.

    Args:
        solution: Its slug.
        settings: What was chosen and why, as plain JSON.
        skip: Where its weights are int8 codes from then on, the paths of linear layers that were left in floats; None
            where the form of the weights is as it was.
    """

    solution: str
    settings: Mapping[str, Any]
    skip: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TreatmentRecord:
    """Every solution that was applied, in order, and the name of the checkpoint that all began with."""

    source: str
    steps: tuple[Step, ...] = ()

    @property
    def solutions(self) -> tuple[str, ...]:
        return tuple(step.solution for step in self.steps)

    @property
    def holds_codes(self) -> bool:
        """Whether weights are in a form that transformers alone cannot read."""
        return any(step.skip is not None for step in self.steps)

    def then(self, step: Step) -> "TreatmentRecord":
        """The same with one step more."""
        return replace(self, steps=(*self.steps, step))
