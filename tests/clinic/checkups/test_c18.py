"""A model that stalls now and then is found out, on a clock that the test turns."""

import time
from functools import partial

import pytest
import torch

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.findings import Examination
from transformer_problems.lab.meters.requests import RequestTimes, time_requests
from transformer_problems.lab.meters.roofline import Roofline
from transformer_problems.problems.p18_realtime_deployment import checkup
from transformer_problems.problems.p18_realtime_deployment.checkup import CHECKUP
from transformer_problems.problems.p18_realtime_deployment.fault import FAULT

STEP_S = 0.004  # what a request takes on the test's clock


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += STEP_S
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Clock()
    monkeypatch.setattr(checkup, "time_requests", partial(time_requests, clock=turned))
    monkeypatch.setattr(checkup, "_MOST", 40)
    monkeypatch.setattr(time, "sleep", turned.sleep)


def examined(subject: Subject, material: Material) -> Examination:
    visit = Visit(subject, material)
    visit.__dict__["roofline"] = Roofline(1e10, 1e10)  # measuring one takes seconds, and changes no time
    return CHECKUP.examine(visit)


def severities(found: Examination) -> set[str]:
    thresholds = load_checkups()[18].thresholds
    return {thresholds[metric].severity(value.value) for metric, value in found.readings.items()}


def test_a_stall_at_every_fifth_request_makes_the_tail(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    """Healthy requests take 4 ms each; of the ill, one in five 154 ms, so 95% need that, 38.5 times the usual."""
    for subject, material in ((causal, texts), (encoder, texts), (vision, images)):
        well, ill = examined(subject, material), examined(FAULT.plant(subject, 0), material)
        assert severities(well) == {"ok"}
        assert well.readings["p95_s"].value == pytest.approx(STEP_S)
        assert well.figures["within_50_ms_share"] == 1
        assert severities(ill) == {"mild", "severe"}
        assert ill.readings["p95_s"].low == pytest.approx(0.154)
        assert ill.readings["tail_ratio"].value == pytest.approx(38.5)
        assert 0.75 <= ill.figures["within_50_ms_share"] <= 0.85
        assert ill.curve.points[-1] == (100, pytest.approx(154))
        assert not subject.model._forward_pre_hooks


def test_a_percentile_lies_between_the_ranks_that_the_binomial_gives() -> None:
    """Of 100 times 90 to 99 are below the percentile in 95% of cases: it lies between the 90th and the 100th."""
    found = checkup._percentile(RequestTimes(tuple(float(i) for i in range(1, 101))), 95)
    assert found.value == pytest.approx(95.05)
    assert (found.low, found.high) == (90, 100)


def test_half_the_layers_halve_what_is_not_the_head(encoder: Subject, texts: Material) -> None:
    bare = encoder.with_model(encoder.model.bert)
    factors = {remedy.solution: remedy.factor for remedy in examined(bare, texts).remedies}
    assert factors["distillation"] == 2
    assert factors["pruning"] == pytest.approx(4 / 3)
    with_head = {remedy.solution: remedy.factor for remedy in examined(encoder, texts).remedies}
    assert 1 < with_head["distillation"] < 2
    assert all(factor >= 1 for factor in with_head.values())


def test_twice_the_same_and_the_model_as_it_was(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    first, second = examined(causal, texts), examined(causal, texts)
    for metric, value in first.readings.items():
        assert value.value == pytest.approx(second.readings[metric].value)
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())
    assert not causal.model.training
    assert all(weight.grad is None and weight.requires_grad for weight in causal.model.parameters())
