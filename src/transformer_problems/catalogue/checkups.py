"""Reads checkups.toml and thresholds.json: what each check-up asks, reads, and holds a reading against."""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from transformer_problems.catalogue.table import Table
from transformer_problems.core.errors import CatalogueError
from transformer_problems.core.findings import Threshold

CALIBRATED = "calibrated"


@dataclass(frozen=True, slots=True)
class CheckupEntry:
    """What is asked of a model about one problem, and the thresholds of what is read, by metric."""

    problem: int
    question: str
    thresholds: dict[str, Threshold]


@cache
def load_checkups() -> dict[int, CheckupEntry]:
    """The check-ups by problem.

    Raises:
        CatalogueError: If a file breaks the form; the message says which and where.
    """
    home = files("transformer_problems.catalogue")
    text = home.joinpath("checkups.toml").read_text(encoding="utf-8")
    calibrated: dict[str, dict[str, float]] = json.loads(home.joinpath("thresholds.json").read_text(encoding="utf-8"))
    whole = Table(tomllib.loads(text), "checkups.toml")
    entries = [_entry(table, calibrated) for table in whole.tables("checkup")]
    whole.done()
    return {entry.problem: entry for entry in sorted(entries, key=lambda entry: entry.problem)}


def _entry(table: Table, calibrated: dict[str, dict[str, float]]) -> CheckupEntry:
    problem, question = table.integer("problem", 1, 99), table.text("question")
    readings = [_threshold(reading, calibrated) for reading in table.tables("reading")]
    table.done()
    if not readings:
        raise CatalogueError(f"{table.where} must have a reading. Add one as [[checkup.reading]].")
    return CheckupEntry(problem, question, {reading.metric: reading for reading in readings})


def _threshold(table: Table, calibrated: dict[str, dict[str, float]]) -> Threshold:
    metric, label, unit = (table.text(name) for name in ("metric", "label", "unit"))
    better = table.choice("better", ("lower", "higher"))
    source = table.text("source")
    if source.startswith(CALIBRATED):
        if metric not in calibrated:
            raise CatalogueError(f"thresholds.json lacks {metric}. Run scripts/calibrate_clinic.py.")
        mild, severe = calibrated[metric]["mild"], calibrated[metric]["severe"]
    else:
        mild, severe = (float(table.take(name, (int, float), "a number")) for name in ("mild", "severe"))
    table.done()
    if (severe - mild) * (1 if better == "lower" else -1) < 0:
        raise CatalogueError(f"{table.where} must have severe beyond mild; got {mild} and {severe}.")
    return Threshold(metric, label, unit, better, mild, severe, source)
