"""Every check-up at the beds of the ward: what it reads of healthy models, and of copies with its fault planted."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from transformer_problems.catalogue import Problem
from transformer_problems.checkpoints.checkup import Checkup, Fault, Prepares, Visit
from transformer_problems.checkpoints.material import Material, machines_images, machines_texts
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.clinic.ward import Patient, admit, patients
from transformer_problems.core.errors import ArgumentError, CombinationError, StoreCorruptedError
from transformer_problems.core.findings import NotApplicable, Severity
from transformer_problems.core.records import Interval
from transformer_problems.problems import load_checkup, load_fault

FEWEST = 20  # healthy models of each check-up, and as many ill ones
_MOST_FORMS = 20  # of a kind, in the ward

Half = Literal["calibration", "report"]
Condition = Literal["healthy", "ill"]


@dataclass(frozen=True, slots=True)
class WardReading:
    """One reading of one model.

    Args:
        half: Whether it helped to set thresholds, or tells how well they do.
        severity: How the final thresholds judge it.
    """

    model: str
    form: str
    kind: Kind
    half: Half
    condition: Condition
    metric: str
    value: float
    low: float
    high: float
    severity: Severity = "ok"


def examine_ward(
    problem: Problem, cache: Path, progress: Callable[[str], None] = lambda told: None
) -> list[WardReading]:
    """Readings of 20 healthy models or more and of as many ill ones, of every form that can have the fault.

    Args:
        cache: Where the ward keeps its models.
        progress: Called with a model's name before it is examined.

    Raises:
        ArgumentError: If too few forms can have the fault, a reading is not finite, or an ill model is turned away.
    """
    checkup, fault = load_checkup(problem), load_fault(problem)
    materials: dict[bool, Material] = {True: machines_images(), False: machines_texts()}
    found: list[WardReading] = []
    for patient, half in _admissions(checkup, fault, cache, materials):
        progress(patient.name)
        healthy = admit(patient, cache)
        if isinstance(fault, Prepares):
            healthy = fault.prepare(healthy, patient.seed)
        material = materials[patient.kind == "image"]
        ill = fault.plant(healthy, patient.seed)
        conditions: list[tuple[Condition, Subject]] = [("healthy", healthy), ("ill", ill)]
        for condition, subject in conditions:
            readings = _readings(checkup, subject, material)
            found += [
                WardReading(patient.name, patient.form, patient.kind, half, condition, metric, *_rounded(value))
                for metric, value in readings.items()
            ]
    return found


def save_readings(readings: Iterable[WardReading], file: Path) -> None:
    """Write them as CSV, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in fields(WardReading))
        writer.writerows(astuple(reading) for reading in readings)
    unfinished.replace(file)


def load_readings(file: Path) -> list[WardReading]:
    """What `save_readings` wrote.

    Raises:
        StoreCorruptedError: If the file is not whole.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
        return [WardReading(**{**row, **{name: float(row[name]) for name in ("value", "low", "high")}}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreCorruptedError(f"{file} holds no readings of the ward ({error}). Restore or remove it.") from error


def _admissions(
    checkup: Checkup, fault: Fault, cache: Path, materials: Mapping[bool, Material]
) -> Iterator[tuple[Patient, Half]]:
    """The healthy models in rounds of one of each form that can have the fault, with the half that each is in.

    Sizes change from round to round, so halves go 0, 1, 1, 0 by round and start elsewhere for every other form: each
    form is in both halves, and so is each width and depth.
    """
    kinds: list[Kind] = [kind for kind in get_args(Kind) if kind not in checkup.not_for]
    forms = [patient for kind in kinds for patient in _first_of_each_form(kind)]
    able = [patient for patient in forms if _can_be_ill(checkup, fault, admit(patient, cache), materials)]
    if not able:
        raise ArgumentError(f"the fault of problem {checkup.problem} must suit a form of the ward; it suits none.")
    num_rounds = max(2, math.ceil(FEWEST / len(able)))
    for turn in range(num_rounds):
        for place, first in enumerate(able):
            halves: tuple[Half, Half] = ("calibration", "report")
            yield _of_same_form(first, turn), halves[(turn // 2 + turn + place) % 2]


def _first_of_each_form(kind: Kind) -> list[Patient]:
    firsts: dict[str, Patient] = {}
    for patient in patients(kind, _MOST_FORMS):
        firsts.setdefault(patient.form, patient)
    return list(firsts.values())


def _of_same_form(first: Patient, turn: int) -> Patient:
    num_forms = len(_first_of_each_form(first.kind))
    same = [patient for patient in patients(first.kind, num_forms * (turn + 1)) if patient.form == first.form]
    return same[turn]


def _can_be_ill(checkup: Checkup, fault: Fault, subject: Subject, materials: Mapping[bool, Material]) -> bool:
    """Whether models of this form can be examined for the problem and be given it."""
    try:
        fault.plant(subject, 0)
    except CombinationError:
        return False
    return not isinstance(checkup.examine(Visit(subject, materials[subject.kind == "image"])), NotApplicable)


def _readings(checkup: Checkup, subject: Subject, material: Material) -> Mapping[str, Interval]:
    found = checkup.examine(Visit(subject, material))
    if isinstance(found, NotApplicable):
        raise ArgumentError(f"check-up {checkup.problem} must apply to every model of a form; it says {found.reason}")
    for metric, value in found.readings.items():
        if not math.isfinite(value.value):
            raise ArgumentError(f"{metric} must be finite; got {value.value} of {subject.name}. Bound the reading.")
    return found.readings


def _rounded(value: Interval) -> tuple[float, float, float]:
    """To the digits that are written, so that what is judged is what can be read."""
    low, middle, high = (float(f"{x:.7g}") for x in (value.low, value.value, value.high))
    return middle, low, high
