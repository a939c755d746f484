"""What a treatment of a checkpoint is, and how one is found by the name of its solution."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.record import Step, TreatmentRecord
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.treatments import TREATMENTS
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Finding

# roles of solutions that change what a model learns, and so have to be there while it does
_TRAINED_ANEW = ("attention", "position", "recurrence", "residual", "normalization", "tokens", "training")


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
        why = "needs a model trained anew with it" if solution.role in _TRAINED_ANEW else "is used from Python"
        raise CombinationError(
            f"{solution.slug} cannot be applied to a trained checkpoint: it {why}. Those that can: "
            f"{', '.join(TREATMENTS)}. See `transformer-problems show {solution.slug}`."
        )
    module, _, attribute = TREATMENTS[solution.slug].partition(":")
    treatment: Treatment = getattr(importlib.import_module(f"transformer_problems.{module}"), attribute)()
    return treatment


def treatable(findings: Sequence[Finding], subject: Subject) -> str | None:
    """The first remedy of these findings, mild or severe ones, that promises something and that this model can have."""
    for finding in findings:
        for remedy in finding.remedies if finding.severity in ("severe", "mild") else ():
            is_promising = remedy.solution in TREATMENTS and remedy.factor > 1
            if is_promising and load_treatment(remedy.solution).refusal(subject) is None:
                return remedy.solution
    return None


def require_applicable(treatment: Treatment, subject: Subject) -> None:
    """That a model can have a treatment.

    Raises:
        CombinationError: If it cannot, with the reason.
    """
    if reason := treatment.refusal(subject):
        raise CombinationError(f"{treatment.solution} cannot be applied to {subject.name}: {reason}")


def applied(treatment: Treatment, visit: Visit) -> Visit:
    """The visit of the treated copy, with what was done in its record.

    Raises:
        CombinationError: If the model cannot have it.
    """
    before = visit.subject
    require_applicable(treatment, before)
    treated = treatment.apply(visit)
    record = (before.record or TreatmentRecord(before.name)).then(
        Step(treatment.solution, treated.settings, treated.skip)
    )
    return replace(visit, subject=replace(treated.subject, record=record))
