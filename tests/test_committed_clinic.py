"""The page of the check-ups, their thresholds and their committed readings agree."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

from transformer_problems.catalogue import load_catalogue
from transformer_problems.catalogue.checkups import CALIBRATED, load_checkups
from transformer_problems.clinic.calibration import calibrated, load_results
from transformer_problems.clinic.rounds import load_readings
from transformer_problems.problems import has_checkup, load_fault
from transformer_problems.report.ward_page import ward_page

ROOT = Path(__file__).parents[1]
READINGS = ROOT / "results" / "clinic"
CATALOGUE, ENTRIES = load_catalogue(), load_checkups()
RESULTS = load_results(READINGS / "summary.json")
REDO = "Run: python scripts/calibrate_clinic.py"


def rows_of(number: int) -> list[dict[str, str]]:
    with (READINGS / f"{CATALOGUE.problem(number).folder}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_page() -> None:
    assert (ROOT / "docs" / "clinic.md").read_text() == ward_page(RESULTS, CATALOGUE, ENTRIES), REDO


def test_once_every_room_has_a_checkup_each_has_results() -> None:
    with_checkup = {problem.number for problem in CATALOGUE.problems if has_checkup(problem)}
    assert set(RESULTS) <= with_checkup
    if len(with_checkup) == len(CATALOGUE.problems):
        assert set(RESULTS) == with_checkup, REDO


@pytest.mark.parametrize("number", RESULTS)
def test_the_page_tells_what_the_readings_say(number: int) -> None:
    """Counted anew from the files: which models of the half that is reported were suspected."""
    ours, suspected = ENTRIES[number].thresholds, defaultdict(bool)
    for row in rows_of(number):
        threshold = ours[row["metric"]]
        assert row["severity"] == threshold.severity(float(row["value"])), REDO
        if row["half"] == "report":
            sign = 1 if threshold.better == "lower" else -1
            suspected[row["condition"], row["model"]] |= sign * float(row["value"]) >= sign * threshold.mild
    ill = [found for (condition, _), found in suspected.items() if condition == "ill"]
    well = [found for (condition, _), found in suspected.items() if condition == "healthy"]
    line = re.search(rf"^\| {number:02d} \|.*$", (ROOT / "docs" / "clinic.md").read_text(), re.MULTILINE)
    assert line is not None
    assert f"| {sum(ill)} of {len(ill)} (" in line.group()
    assert f"| {len(well) - sum(well)} of {len(well)} (" in line.group()


@pytest.mark.parametrize("number", RESULTS)
def test_at_least_twenty_ill_and_twenty_healthy_with_each_form_in_both_halves(number: int) -> None:
    rows = rows_of(number)
    for condition in ("healthy", "ill"):
        assert len({row["model"] for row in rows if row["condition"] == condition}) >= 20
    halves = defaultdict(set)
    for row in rows:
        halves[row["form"], row["kind"]].add(row["half"])
    assert all(found == {"calibration", "report"} for found in halves.values())


@pytest.mark.parametrize("number", RESULTS)
def test_thresholds_are_those_that_the_calibration_half_gives(number: int) -> None:
    readings = load_readings(READINGS / f"{CATALOGUE.problem(number).folder}.csv")
    for threshold in ENTRIES[number].thresholds.values():
        if threshold.source.startswith(CALIBRATED):
            assert calibrated(readings, threshold) == threshold, REDO


@pytest.mark.parametrize("number", RESULTS)
def test_the_fault_is_the_one_that_the_room_plants(number: int) -> None:
    assert load_fault(CATALOGUE.problem(number)).name == RESULTS[number].fault, REDO
