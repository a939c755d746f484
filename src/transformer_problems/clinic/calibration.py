"""How the check-ups fare on models of which it is known whether they are ill, and the thresholds that follow."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

from transformer_problems.catalogue.checkups import CALIBRATED
from transformer_problems.clinic.rounds import Condition, Half, WardReading
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.findings import Threshold
from transformer_problems.core.records import Environment, Interval
from transformer_problems.lab.statistics import share_interval

_WIDE = 10  # values that span more than this are halved in logs


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How a check-up did on some models: ill ones it missed, healthy ones that it took for ill."""

    ill: int
    healthy: int
    missed: tuple[str, ...]
    alarmed: tuple[str, ...]

    @property
    def sensitivity(self) -> Interval:
        """The share of ill models that it found."""
        return share_interval(self.ill - len(self.missed), self.ill)

    @property
    def specificity(self) -> Interval:
        """The share of healthy models that it left in peace."""
        return share_interval(self.healthy - len(self.alarmed), self.healthy)


@dataclass(frozen=True, slots=True)
class WardResult:
    """What came of one check-up in the ward.

    Args:
        fault: What was done to the ill ones.
        preparation: What was done to the healthy ones before, and to the ill ones with them; empty if nothing was.
        reported: On the half that set no threshold.
        ranges: Metric -> condition -> median with the least and the largest, over both halves.
    """

    problem: int
    fault: str
    preparation: str
    environment: Environment
    calibration: Accuracy
    reported: Accuracy
    ranges: Mapping[str, Mapping[Condition, Interval]]


def calibrated(readings: Sequence[WardReading], threshold: Threshold) -> Threshold:
    """The threshold with `mild` and `severe` from the calibration half, where its source says so; else as it is.

    Mild is half-way between the most ill-like healthy value and the most healthy-like ill one, in logs where values
    span more than 10x; where they overlap, the cut with the best mean of sensitivity and specificity, and of equal
    ones the furthest from well. Severe is the most healthy-like of the ill, but never nearer to well than mild.
    """
    if not threshold.source.startswith(CALIBRATED):
        return threshold
    ours = [reading for reading in readings if (reading.half, reading.metric) == ("calibration", threshold.metric)]
    sign = 1 if threshold.better == "lower" else -1  # times it, ill ones are the larger
    well = [sign * reading.value for reading in ours if reading.condition == "healthy"]
    ill = [sign * reading.value for reading in ours if reading.condition == "ill"]
    if not well or not ill:
        raise ArgumentError(f"{threshold.metric} must be read of healthy and ill models; got {len(well)}, {len(ill)}.")
    apart = max(well) < min(ill)
    values = [max(well), min(ill)] if apart else sorted({*well, *ill})
    cuts = [_half_way(a, b, [*well, *ill]) for a, b in itertools.pairwise(values)] or values
    mild = max(cuts, key=lambda cut: (_balanced_accuracy(cut, well, ill), cut))
    severe = max(min(ill), mild)
    return replace(threshold, mild=float(f"{sign * mild:.4g}"), severe=float(f"{sign * severe:.4g}"))


def judged(readings: Iterable[WardReading], thresholds: Mapping[str, Threshold]) -> list[WardReading]:
    """The readings with the severity that thresholds give them."""
    return [replace(r, severity=thresholds[r.metric].severity(r.value)) for r in readings]


def accuracy(readings: Iterable[WardReading], half: Half) -> Accuracy:
    """How judged readings of one half speak of its models; a model is found ill where any of them is not ok."""
    suspected: dict[tuple[Condition, str], bool] = {}
    for reading in readings:
        if reading.half == half:
            key = reading.condition, reading.model
            suspected[key] = suspected.get(key, False) or reading.severity != "ok"
    missed = tuple(name for (condition, name), is_ill in suspected.items() if condition == "ill" and not is_ill)
    alarmed = tuple(name for (condition, name), is_ill in suspected.items() if condition == "healthy" and is_ill)
    num_ill = sum(condition == "ill" for condition, _ in suspected)
    return Accuracy(num_ill, len(suspected) - num_ill, missed, alarmed)


def ranges(readings: Sequence[WardReading]) -> dict[str, dict[Condition, Interval]]:
    """Metric -> condition -> median with the least and the largest value."""
    found: dict[str, dict[Condition, Interval]] = {}
    for metric in dict.fromkeys(reading.metric for reading in readings):
        for condition in get_args(Condition):
            values = [r.value for r in readings if (r.metric, r.condition) == (metric, condition)]
            found.setdefault(metric, {})[condition] = Interval(median(values), min(values), max(values))
    return found


def save_results(results: Mapping[int, WardResult], file: Path) -> None:
    """Write what came of the check-ups as JSON, with sensitivity and specificity spelled out."""
    told = {
        str(number): {
            **asdict(result),
            "sensitivity": asdict(result.reported.sensitivity),
            "specificity": asdict(result.reported.specificity),
        }
        for number, result in sorted(results.items())
    }
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_results(file: Path) -> dict[int, WardResult]:
    """What `save_results` wrote; nothing where there is no such file."""
    if not file.exists():
        return {}
    told: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return {
        int(number): WardResult(
            problem=int(number),
            fault=entry["fault"],
            preparation=entry["preparation"],
            environment=Environment(**entry["environment"]),
            calibration=_accuracy(entry["calibration"]),
            reported=_accuracy(entry["reported"]),
            ranges={
                metric: {cast("Condition", condition): Interval(**value) for condition, value in by_condition.items()}
                for metric, by_condition in entry["ranges"].items()
            },
        )
        for number, entry in told.items()
    }


def _half_way(a: float, b: float, values: Sequence[float]) -> float:
    sizes = [abs(value) for value in values]
    same_side = min(values) > 0 or max(values) < 0
    if same_side and max(sizes) / min(sizes) > _WIDE:
        return math.copysign(math.sqrt(a * b), a)
    return (a + b) / 2


def _balanced_accuracy(cut: float, well: Sequence[float], ill: Sequence[float]) -> float:
    found = sum(value >= cut for value in ill) / len(ill)
    silent = sum(value < cut for value in well) / len(well)
    return (found + silent) / 2


def _accuracy(told: Mapping[str, Any]) -> Accuracy:
    return Accuracy(told["ill"], told["healthy"], tuple(told["missed"]), tuple(told["alarmed"]))
