"""What a measurement run writes down, and what it concludes: plain records without behaviour."""

from dataclasses import dataclass
from typing import Literal

Scale = Literal["quick", "standard", "full"]
VerdictWord = Literal["helps", "no effect", "hurts", "inconclusive", "diverged", "not runnable here"]


@dataclass(frozen=True, slots=True)
class Cell:
    """The unit of work: one arm of one problem at one scale with one seed; finished whole or not at all."""

    problem: int
    arm: str
    scale: Scale
    seed: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number, with its unit and what was varied to get it.

    Args:
        metric: What was measured, e.g. "latency_s".
        unit: Its unit, e.g. "s"; "1" for pure numbers.
        value: The number.
        x: What was varied, e.g. sequence length; None where nothing was.
        x_unit: Unit of x, e.g. "tokens".
        repeat: Which of several paired samples (timing repeats, held-out examples) this is.
    """

    metric: str
    unit: str
    value: float
    x: float | None = None
    x_unit: str = ""
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a run was made."""

    version: str
    revision: str
    python: str
    torch: str
    platform: str
    processor: str
    device: str
    threads: int
    dtype: str
    date: str


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the criterion says of one arm.

    Args:
        effect: Paired effect against the baseline in the criterion's terms; None where it could not be measured.
        reason: One sentence that says why, in the reader's units.
    """

    problem: int
    arm: str
    word: VerdictWord
    effect: Interval | None
    reason: str
