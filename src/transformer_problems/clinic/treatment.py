"""What a treatment of a checkpoint is, and how one is found by the name of its solution."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.record import Step, TreatmentRecord
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.treatments import TREATMENTS
from transformer_problems.core.errors import CombinationError


@dataclass(frozen=True, slots=True)
class Treated:
    """What a treatment gives.

    Args:
        subject: A treated copy.
        settings: What was chosen and why, as plain JSON.
        skip: See `Step`.
    """

    subject: Subject
    settings: Mapping[str, Any]
    skip: tuple[str, ...] | None = None


class Treatment(Protocol):
    """A solution of the catalogue as it is applied to a trained checkpoint, without training it anew."""

    solution: str  # its slug
    claims: tuple[int, ...]  # numbers of the problems that it is to ease

    def refusal(self, subject: Subject) -> str | None:
        """Why this model cannot have it, in one clear line; nothing where it can."""
        ...

    def apply(self, visit: Visit) -> Treated:
        """A treated copy; the argument stays as it was."""
        ...


def load_treatment(name: str) -> Treatment:
    """The treatment of a solution, by its slug or name.

    Raises:
        UnknownNameError: If there is no such solution.
        CombinationError: If it has no treatment.
    """
    solution = load_catalogue().solution(name)
    if solution.slug not in TREATMENTS:
        needs = (
            "a model trained anew with it" if solution.role not in ("decoding", "deployment") else "a program's call"
        )
        raise CombinationError(
            f"{solution.slug} cannot be applied to a trained checkpoint: it needs {needs}. Those that can: "
            f"{', '.join(TREATMENTS)}. See `transformer-problems show {solution.slug}`."
        )
    module, _, attribute = TREATMENTS[solution.slug].partition(":")
    treatment: Treatment = getattr(importlib.import_module(f"transformer_problems.{module}"), attribute)()
    return treatment


def applied(treatment: Treatment, visit: Visit) -> Visit:
    """The visit of the treated copy, with what was done in its record.

    Raises:
        CombinationError: If the model cannot have it.
    """
    before = visit.subject
    if reason := treatment.refusal(before):
        raise CombinationError(f"{treatment.solution} cannot be applied to {before.name}: {reason}")
    treated = treatment.apply(visit)
    record = (before.record or TreatmentRecord(before.name)).then(
        Step(treatment.solution, treated.settings, treated.skip)
    )
    return replace(visit, subject=replace(treated.subject, record=record))
