"""Running a list of checks on one subject and saying what held and what did not."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from transformer_problems.core.errors import ContractError


class NotApplicable(Exception):
    """Raised inside a check that has nothing to test on this subject; the text says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of a contract and how it went."""

    name: str
    outcome: Literal["holds", "broken", "not applicable"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ContractReport:
    """Every check of a contract on one subject; `print` it."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.outcome == "broken")

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"  {c.name:<{width}}  {c.outcome}{': ' + c.detail if c.detail else ''}" for c in self.checks]
        return "\n".join([self.subject, *lines])


def run_checks(subject: str, checks: Mapping[str, Callable[[], str | None]]) -> ContractReport:
    """Run every check, then raise if any broke.

    Args:
        checks: Name to function; a function raises AssertionError where the rule is broken. Any other exception
            breaks the rule too and is named, except NotApplicable. What it returns is how far it could look.

    Raises:
        ContractError: With the whole report, if any check is broken.
    """
    done = []
    for name, check in checks.items():
        try:
            detail = check() or ""
        except NotApplicable as reason:
            done.append(Check(name, "not applicable", str(reason)))
        except AssertionError as error:
            done.append(Check(name, "broken", str(error)))
        except Exception as error:  # whatever a foreign module raises is this check's finding
            done.append(Check(name, "broken", f"raised {type(error).__name__}: {error}"))
        else:
            done.append(Check(name, "holds", detail))
    report = ContractReport(subject, tuple(done))
    if report.broken:
        raise ContractError(f"contract broken\n{report}")
    return report


def assert_close(actual: Tensor, expected: Tensor, what: str, *, tolerance: float) -> None:
    """Largest difference relative to the largest expected magnitude, with a sentence when it is too large."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp_min(1e-30)
    assert difference <= tolerance * scale, (
        f"{what}: differs by {difference:.3g} where the largest value is {scale:.3g} (allowed {tolerance:g} of it)"
    )


@contextmanager
def stray_tensors_on_meta() -> Iterator[None]:
    """Inside, tensors made without naming a device land on the meta device and cannot mix with real ones."""
    with torch.device("meta"):
        yield


def chunkings(length: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Ways to cut `length` tokens: all at once, one by one, halves, and three random ways."""
    yield [length]
    yield [1] * length
    yield [length // 2, length - length // 2] if length > 1 else [length]
    for _ in range(3):
        sizes: list[int] = []
        while sum(sizes) < length:
            size = int(torch.randint(1, max(2, length // 2), (), generator=generator))
            sizes.append(min(size, length - sum(sizes)))
        yield sizes
