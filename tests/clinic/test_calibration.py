"""Thresholds, accuracies and intervals on readings whose answer is known on paper."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.clinic import rounds
from transformer_problems.clinic.calibration import (
    Accuracy,
    WardResult,
    accuracy,
    calibrated,
    judged,
    load_results,
    ranges,
    save_results,
)
from transformer_problems.clinic.rounds import Condition, WardReading, examine_ward, load_readings, save_readings
from transformer_problems.clinic.ward import Patient
from transformer_problems.core.errors import ArgumentError, CombinationError, StoreCorruptedError
from transformer_problems.core.findings import Examination, NotApplicable, Threshold
from transformer_problems.core.records import Environment, Interval

LOWER = Threshold("m", "label", "1", "lower", 0.0, 0.0, "calibrated on models")
WHERE = Environment("0.1", "abc", "3.12", "2.7", "Linux", "CPU", "cpu", 1, "float32", "2026-01-01")


def readings(healthy: list[float], ill: list[float], half: str = "calibration", metric: str = "m") -> list[WardReading]:
    both: list[tuple[Condition, list[float]]] = [("healthy", healthy), ("ill", ill)]
    return [
        WardReading(f"{half}-{i}", "llama", "causal", half, condition, metric, value, value, value)
        for condition, values in both
        for i, value in enumerate(values)
    ]


def test_mild_is_half_way_and_severe_the_mildest_of_the_ill() -> None:
    found = calibrated(readings([1, 2, 3], [5, 7, 8]), LOWER)
    assert (found.mild, found.severe) == (4, 5)


def test_values_that_span_more_than_ten_times_are_halved_in_logs() -> None:
    found = calibrated(readings([1, 2], [200, 800]), LOWER)
    assert (found.mild, found.severe) == (20, 200)


def test_where_more_is_better_the_ill_are_below() -> None:
    higher = replace(LOWER, better="higher")
    found = calibrated(readings([5, 7, 8], [1, 2, 3]), higher)
    assert (found.mild, found.severe) == (4, 3)
    assert calibrated(readings([200, 800], [1, 2]), higher).mild == 20
    assert calibrated(readings([0.5, 0.6], [-0.1, 0.1]), higher).mild == pytest.approx(0.3)


def test_where_they_overlap_the_cut_is_the_one_with_most_right() -> None:
    """A cut between 4 and 5 finds 3 of 4 ill and spares 4 of 4; one between 2 and 2.5 finds all and spares 2 of 4."""
    found = calibrated(readings([1, 2, 3, 4], [2.5, 5, 6, 7]), LOWER)
    assert (found.mild, found.severe) == (4.5, 4.5)


def test_severe_is_never_nearer_to_well_than_mild() -> None:
    """Of the ill, two lie with the healthy; only the third stands out."""
    found = calibrated(readings([1, 2, 3, 3], [1, 2, 9]), LOWER)
    assert found.mild == found.severe == 6


def test_the_other_half_and_other_metrics_set_no_threshold() -> None:
    own = readings([1, 2, 3], [5, 7, 8])
    others = readings([50], [60], half="report") + readings([70], [80], metric="other")
    assert calibrated(own + others, LOWER) == calibrated(own, LOWER)


def test_a_threshold_with_a_reason_stays_and_one_without_readings_is_refused() -> None:
    given = Threshold("m", "label", "1", "lower", 0.1, 1.0, "a reason")
    assert calibrated(readings([1], [2]), given) == given
    with pytest.raises(ArgumentError, match="must be read of healthy and ill models; got 1, 0"):
        calibrated(readings([1], []), LOWER)


def test_a_model_is_suspected_by_any_of_its_readings() -> None:
    thresholds = {name: Threshold(name, "", "1", "lower", 2, 3, "") for name in ("m", "other")}
    rows = readings([1, 2], [1, 9]) + readings([1, 1], [2, 1], metric="other") + readings([5], [5], half="report")
    found = accuracy(judged(rows, thresholds), "calibration")
    assert found == Accuracy(ill=2, healthy=2, missed=(), alarmed=("calibration-1",))
    assert accuracy(judged(readings([1], [1]), thresholds), "calibration").missed == ("calibration-0",)


def test_shares_have_wilsons_interval() -> None:
    found = Accuracy(ill=10, healthy=12, missed=("a", "b", "c"), alarmed=())
    z, n, p = 1.959963984540054, 10, 0.7
    middle, reach = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    bounds = [(middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)]
    assert [found.sensitivity.low, found.sensitivity.high] == pytest.approx(bounds, rel=1e-9)
    assert found.sensitivity.value == 0.7
    assert found.specificity == Interval(1.0, pytest.approx(12 / (12 + z**2), rel=1e-9), 1.0)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = readings([1.5, 2], [3, 1e-9])
    save_readings(rows, tmp_path / "deep" / "x.csv")
    assert load_readings(tmp_path / "deep" / "x.csv") == rows
    result = WardResult(2, "fault", "", WHERE, accuracy(rows, "calibration"), accuracy(rows, "report"), ranges(rows))
    assert ranges(rows)["m"]["healthy"] == Interval(1.75, 1.5, 2)
    whole = replace(result, reported=result.calibration)
    save_results({2: whole}, tmp_path / "summary.json")
    assert load_results(tmp_path / "summary.json") == {2: whole}
    assert load_results(tmp_path / "none.json") == {}
    (tmp_path / "deep" / "x.csv").write_text("model,value\na,b\n")
    with pytest.raises(StoreCorruptedError, match="holds no readings of the ward"):
        load_readings(tmp_path / "deep" / "x.csv")


class _Checkup:
    problem, not_for = 2, {"image": "no"}

    def examine(self, visit: Visit) -> Examination | NotApplicable:
        if visit.subject.name.startswith("bert"):
            return NotApplicable("this one never")
        return Examination({"m": exactly(float(visit.subject.model.training))}, "")


class _Fault:
    problem, name = 2, "left in training"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.name.startswith("bloom"):
            raise CombinationError("not this one")
        return subject.with_model(nn.Linear(1, 1).train())


def test_forms_that_can_be_ill_are_in_both_halves_in_both_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Patient] = {}

    def admit(patient: Patient, cache: Path) -> Subject:
        seen[patient.name] = patient
        return Subject(patient.name, patient.kind, nn.Linear(1, 1).eval())

    monkeypatch.setattr(rounds, "admit", admit)
    monkeypatch.setattr(rounds, "load_checkup", lambda problem: _Checkup())
    monkeypatch.setattr(rounds, "load_fault", lambda problem: _Fault())
    found = examine_ward(load_catalogue().problem(2), tmp_path)
    for condition, value in (("healthy", 0.0), ("ill", 1.0)):
        of_these = [reading for reading in found if reading.condition == condition]
        assert len({reading.model for reading in of_these}) == len(of_these) == 20
        assert all(reading.value == value for reading in of_these)
    forms: dict[Kind, set[str]] = {"causal": {"llama", "gpt2"}, "encoder": {"roberta", "electra"}}
    for kind, names in forms.items():
        for form in names:
            ours = [reading for reading in found if (reading.kind, reading.form) == (kind, form)]
            for half in ("calibration", "report"):
                sizes = {seen[r.model].embed_dim for r in ours if r.half == half}
                depths = {seen[r.model].num_layers for r in ours if r.half == half}
                assert sizes == {48, 64}
                assert depths == {2, 3}
