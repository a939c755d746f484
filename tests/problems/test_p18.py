"""Problem 18: every arm measures what is shown, files serve what was measured, and no test image is learned from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.digits import load_digit_images
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.requests import RequestTimes
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p18_realtime_deployment import experiment as p18
from transformer_problems.problems.p18_realtime_deployment import training
from transformer_problems.problems.p18_realtime_deployment.forms import FORMS_OF_ONE, SIDE, ImagePlan, build_model
from transformer_problems.problems.p18_realtime_deployment.serving import (
    ColdStart,
    cold_start,
    read_torch,
    request_path,
    store_torch,
)
from transformer_problems.problems.p18_realtime_deployment.training import asked_images, served_model
from transformer_problems.solutions.compression.int8 import Int8Linear

EXPERIMENT = p18.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
PLAN = ImagePlan(32, 2, 2, 2, batch_size=4)
LEARNED = ImagePlan(32, 2, 200, 100, batch_size=16)  # enough to answer with more than one class
CPU = torch.device("cpu")


def bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(18, arm, "quick", 0), CPU, ModelCache(folder, "test"), lambda done: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p18._SIZES, "quick", p18._Size(LEARNED, blocks=2, requests=5, cold_starts=1, seeds=1))
        patch.setattr(p18, "cold_start", lambda folder: ColdStart(1.5, 10**8, used_torch=False))
        return {arm: list(EXPERIMENT.measure(bench(arm, folder))) for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_measures_all_that_is_shown(arm: str, measured: dict[str, list[Measurement]]) -> None:
    found = {m.metric for m in measured[arm]}
    shown = {column.metric for column in EXPERIMENT.columns} | {EXPERIMENT.chart.metric}
    assert shown - ({"agreement"} if arm not in FORMS_OF_ONE else set()) <= found
    assert sum(m.metric == "accuracy" for m in measured[arm]) == len(asked_images())
    for block in (0, 1):
        p50, p95, p99 = (
            next(m.value for m in measured[arm] if (m.metric, m.repeat) == (f"p{percent}_s", block))
            for percent in (50, 95, 99)
        )
        assert 0 < p50 <= p95 <= p99


def test_forms_of_one_model_agree_with_it(measured: dict[str, list[Measurement]]) -> None:
    right = [m.value for m in measured["eager"] if m.metric == "accuracy"]
    assert sum(right) > 0.3 * len(right)  # one class alone, which any form would agree on, is right in a tenth
    agreed = {arm: next(m.value for m in measured[arm] if m.metric == "agreement") for arm in FORMS_OF_ONE}
    assert agreed["eager"] == agreed["onnx"] == 1
    assert min(agreed.values()) > 0.9


def test_a_block_of_requests_is_told_by_percentiles_and_deadlines() -> None:
    told = list(p18._of_block(RequestTimes((0.0011,) * 3 + (0.0041,))))
    assert ("p50_s", "s", pytest.approx(0.0011), None) in told
    shares = {x: value for metric, _, value, x in told if metric == "share_in_time"}
    assert (shares[1.0], shares[1.4], shares[4.0], shares[5.6]) == (0, 0.75, 0.75, 1)


@pytest.mark.parametrize("arm", ["eager", "int8", "int8_static", "pruned", "distilled", "edge"])
def test_a_stored_model_answers_as_the_one_measured(arm: str, tmp_path: Path) -> None:
    model = served_model(bench(arm, tmp_path / "cache"), PLAN).eval()
    images = asked_images().pixels
    assert store_torch(model, arm, PLAN, tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    with torch.no_grad():
        assert torch.equal(read_torch(tmp_path)(images), model(images))


def test_a_fresh_process_serves_an_onnx_file_without_torch(tmp_path: Path) -> None:
    model = build_model("eager", PLAN)
    p18._served("onnx", model, PLAN, tmp_path)
    np.save(request_path(tmp_path), asked_images().pixels[:1].numpy())
    start = cold_start(tmp_path)
    assert not start.used_torch
    assert start.first_answer_s > 0
    assert start.resident_bytes is None or 2**24 < start.resident_bytes < 2**31


def test_a_served_model_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 1 before it answered"):
        cold_start(tmp_path)


def test_arms_are_what_they_say(tmp_path: Path) -> None:
    made = {arm: served_model(bench(arm, tmp_path), PLAN) for arm in ARMS}
    for arm in ("int8", "int8_static"):
        layers = [part for part in made[arm].modules() if isinstance(part, Int8Linear)]
        assert layers
        assert all((part.x_scale is not None) == (arm == "int8_static") for part in layers)
    assert len(made["distilled"].blocks) == 1
    assert made["pruned"].blocks[0].feed_forward.up.out_features == 2 * PLAN.width
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made["edge"].modules())


def test_no_test_image_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {tuple(row) for row in load_digit_images()[0].pixels.flatten(1).tolist()}
    seen: list[int] = []
    upscale = training.upscaled

    def look(images, size: int):
        rows = {tuple(row) for row in images.pixels.flatten(1).tolist()}
        assert size == SIDE
        assert rows <= known
        seen.append(len(rows))
        return upscale(images, size)

    def train(model: nn.Module, batch_loss, plan, **keywords: object) -> None:
        loss: Tensor = batch_loss(model, 0)
        assert loss.isfinite()

    monkeypatch.setattr(training, "upscaled", look)
    monkeypatch.setattr(training, "train", train)
    for arm in ARMS:
        served_model(bench(arm, tmp_path / arm), PLAN)
    assert len(seen) >= len(ARMS)


def test_the_finding_and_the_notes_name_their_figures(measured: dict[str, list[Measurement]]) -> None:
    results = Results([(Cell(18, arm, "quick", 0), m) for arm, found in measured.items() for m in found])
    assert f"half of its requests within {results.mean('eager', 'p50_s') * 1e3:.1f} ms" in EXPERIMENT.finding(results)
    assert "first answer takes 1.5 s" in EXPERIMENT.finding(results)
    assert any("process that never imports PyTorch" in note for note in EXPERIMENT.notes(results))
