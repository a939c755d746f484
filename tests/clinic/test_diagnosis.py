"""What a diagnosis holds is what its page in docs says."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from transformer_problems import diagnose
from transformer_problems.catalogue.checkups import CheckupEntry
from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.clinic.diagnose import _give_back_memory, judge
from transformer_problems.clinic.diagnosis import failing
from transformer_problems.core.errors import ArgumentError, CheckpointError
from transformer_problems.core.findings import Examination, Finding, Remedy, Threshold
from transformer_problems.core.records import Interval

PAGE = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text()
LOWER = Threshold("share", "a share", "%", "lower", mild=0.25, severe=0.5, source="a reason")
HIGHER = Threshold("reach", "a reach", "%", "higher", mild=0.5, severe=0.25, source="a reason")


@pytest.mark.parametrize(
    ("threshold", "value", "severity"),
    [
        (LOWER, 0.2, "ok"),
        (LOWER, 0.25, "mild"),
        (LOWER, 0.5, "severe"),
        (HIGHER, 0.6, "ok"),
        (HIGHER, 0.5, "mild"),
        (HIGHER, 0.1, "severe"),
    ],
)
def test_severity(threshold: Threshold, value: float, severity: str) -> None:
    assert threshold.severity(value) == severity


def test_the_worst_reading_decides_and_the_best_remedy_stands_first() -> None:
    entry = CheckupEntry(1, "How?", {"share": LOWER, "reach": HIGHER})
    readings = {"share": Interval(0.1, 0.1, 0.1), "reach": Interval(0.4, 0.3, 0.5)}
    remedies = (Remedy("rope", "some", 1.5), Remedy("alibi", "much", 4.0))
    found = judge(entry, Examination(readings, "so it is", remedies))
    assert found.severity == "mild"
    assert [reading.threshold.metric for reading in found.readings] == ["reach", "share"]
    assert [remedy.solution for remedy in found.remedies] == ["alibi", "rope"]
    well = judge(entry, Examination({"share": Interval(0.1, 0.1, 0.1)}, "so it is", remedies))
    assert (well.severity, well.remedies) == ("ok", ())


def test_what_is_as_bad_as_asked() -> None:
    found = [Finding(i, severity, "") for i, severity in enumerate(("severe", "mild", "ok", "not examined"))]
    assert [finding.problem for finding in failing(found, "mild")] == [0, 1]
    assert [finding.problem for finding in failing(found, "severe")] == [0]


def test_the_page_names_every_field() -> None:
    found = diagnose(bundled("draft"), only=[2])
    finding = replace(found.findings[0], remedies=(Remedy("rope", "order"),))
    whole = replace(found, findings=(finding,)).to_json()
    written = set(re.findall(r"`(\w+)`", PAGE))
    parts = [whole, whole["model"], whole["environment"], whole["findings"][0]]
    parts += [whole["findings"][0]["remedies"][0], whole["findings"][0]["readings"][0]]
    parts += [parts[-1]["value"], parts[-1]["threshold"]]
    assert {key for part in parts for key in part} <= written


def test_a_model_in_memory_is_examined_as_its_checkpoint_is() -> None:
    subject = load_subject(bundled("draft"))
    seen: list[Finding] = []
    found = diagnose(subject.model, subject.tokenizer, only=[2], on_finding=seen.append)
    assert seen == list(found.findings)
    assert found.complete
    again = diagnose(bundled("draft"), only=[2])
    assert [f.readings for f in found.findings] == [f.readings for f in again.findings]


def test_what_cannot_be_examined_is_refused() -> None:
    with pytest.raises(ArgumentError, match="1 to 18; got 19"):
        diagnose(bundled("draft"), only=[19])
    with pytest.raises(CheckpointError, match="model of transformers"):
        diagnose(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"only": ["02"]}, "1 to 18; got '02'"),
        ({"only": 2}, "list of numbers of problems, such as .*; got 2"),
        ({"only": "02"}, "list of numbers of problems, such as .*; got '02'"),
        ({"only": []}, r"list of numbers of problems, such as .*; got \[\]"),
        ({"budget_s": -1}, "zero or more; got -1"),
        ({"budget_s": "10"}, "zero or more; got '10'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda; got 'tpu'"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_read(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        diagnose("/no/such/folder", **wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = []
    for _ in range(2_000):  # what is kept lies between what is freed, so that the heap's end cannot move
        freed = bytearray(60_000)
        kept.append(bytearray(2_000))
        kept.append(freed)
    del kept[1::2], freed
    held = resident_bytes()
    _give_back_memory()
    assert held - resident_bytes() > 60_000_000
