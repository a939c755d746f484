"""What was done to a model and what came of it, in the form that is kept."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from transformer_problems.clinic.contract import Clause, Verdict
from transformer_problems.clinic.diagnosis import Description
from transformer_problems.core.findings import Finding
from transformer_problems.core.records import Environment

RECEIPT_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """The proof of a treatment.

    Args:
        model: As it was.
        treated: As it is.
        solutions: In the order in which they were applied.
        settings: Of each, what was chosen and why.
        on_foreign_texts: Whether the texts say little of the model, by which nothing helps.
        findings_before, findings_after: Of the check-ups of the claimed problems.
        written: The folder, where it was.
        caution: What to know before the clauses.
    """

    model: Description
    treated: Description
    solutions: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    material: str
    seed: int
    clauses: tuple[Clause, ...]
    verdict: Verdict
    on_foreign_texts: bool
    findings_before: tuple[Finding, ...]
    findings_after: tuple[Finding, ...]
    environment: Environment
    seconds: float
    written: str | None
    caution: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries, in the form that docs/receipt.md describes; no number that is not finite."""
        told: dict[str, Any] = _finite({"schema": RECEIPT_SCHEMA, **asdict(self)})
        return told


def _finite(told: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(told, Mapping):
        return {key: _finite(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_finite(value) for value in told]
    return None if isinstance(told, float) and not isfinite(told) else told
