"""What a whole check-up amounts to, and the form it is kept in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformer_problems.core.findings import SEVERITIES, Finding, Severity
from transformer_problems.core.records import Environment

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Description:
    """The model that was examined.

    Args:
        trained_len: Tokens that it was trained to take, where its config says so.
        hard_limit: Tokens beyond which it fails; None where it takes any number.
    """

    name: str
    architecture: str
    kind: str
    num_parameters: int
    weight_bytes: int
    dtype: str
    trained_len: int | None
    hard_limit: int | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every finding about one model, with what it was made on and where.

    Args:
        material: Where the texts or images come from.
        findings: In order of their problems.
        complete: Whether every check-up that was asked for has ended.
        caution: What to know before the findings: that the material is foreign to the model, or how it was loaded.
    """

    model: Description
    material: str
    seed: int
    environment: Environment
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    complete: bool = False
    caution: str | None = None

    def count(self, severity: Severity) -> int:
        """How many findings are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def worst_first(self) -> list[Finding]:
        """The findings, the gravest first, then by problem."""
        return sorted(self.findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.problem))

    def with_finding(self, finding: Finding, seconds: float) -> "Diagnosis":
        """The same with one finding more."""
        return replace(self, findings=(*self.findings, finding), seconds=seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries, in the form that docs/diagnosis.md describes."""
        return {"schema": SCHEMA_VERSION, **asdict(self)}


def failing(findings: Sequence[Finding], level: Severity) -> list[Finding]:
    """The findings that are as bad as `level` or worse."""
    grave = SEVERITIES[: SEVERITIES.index(level) + 1]
    return [finding for finding in findings if finding.severity in grave]
