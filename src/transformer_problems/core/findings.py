"""What a check-up of a model writes down: plain records without behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformer_problems.core.records import Interval

Severity = Literal["severe", "mild", "ok", "not applicable", "not examined"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the worst first


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a reading stops to be well.

    Args:
        metric: What is read, e.g. "attention_share".
        label: The same in plain words.
        unit: Its unit; "1" for pure numbers, "%" for shares, which are stored as 0 to 1.
        better: Which way of it is good.
        mild: From here on it is mild.
        severe: From here on it is severe.
        source: Where the two come from: a publication, a reason, or "calibrated" on ill and healthy models.
    """

    metric: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    mild: float
    severe: float
    source: str

    def severity(self, value: float) -> Severity:
        """How a value is judged."""
        sign = 1 if self.better == "lower" else -1
        if sign * value >= sign * self.severe:
            return "severe"
        return "mild" if sign * value >= sign * self.mild else "ok"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A solution of the catalogue, and what it would buy this model.

    Args:
        solution: Its slug.
        promise: What it would change, predicted from the model's own numbers: "about 2.6x faster, 4x smaller".
        factor: How many times better the reading would be by it, to rank by; 1 where that cannot be predicted.
    """

    solution: str
    promise: str
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Curve:
    """What a check-up saw along something: by length, by layer, by number of labels.

    Args:
        points: (x, y), in order of x.
        beside: Another line to compare with, under its name, such as {"random": ((0, 0.5), ...)}.
    """

    title: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...]
    beside: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True, slots=True)
class Examination:
    """What one check-up measured, before it is judged.

    Args:
        readings: Metric -> estimate; each metric has a threshold in the catalogue.
        meaning: One plain sentence with the figures, in the reader's units.
        remedies: Solutions for this problem, in any order.
        figures: Further numbers, by names that end with their unit.
    """

    readings: Mapping[str, Interval]
    meaning: str
    remedies: tuple[Remedy, ...] = ()
    curve: Curve | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a problem cannot be one of this model, or cannot be looked for in it, in one sentence."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One number as it was judged."""

    value: Interval
    threshold: Threshold
    severity: Severity


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check-up found.

    Args:
        readings: The worst first; empty where the problem is not applicable.
        remedies: The best first; empty where all is well.
        seconds: How long the check-up took.
    """

    problem: int
    severity: Severity
    meaning: str
    readings: tuple[Reading, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    curve: Curve | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
