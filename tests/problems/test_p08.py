"""Problem 08: every arm measures what is shown, counts are those reckoned by hand, and tested text is not learned."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p08_high_compute_cost import experiment as p08
from transformer_problems.problems.p08_high_compute_cost import text_models
from transformer_problems.problems.p08_high_compute_cost.text_models import WINDOW, TextPlan, build_model, cheap_model
from transformer_problems.solutions.compression.int4 import Int4Linear
from transformer_problems.solutions.compression.int8 import Int8Linear
from transformer_problems.solutions.compression.sparse_linear import SparseLinear
from transformer_problems.solutions.deployment.compiled import CompiledModel
from transformer_problems.solutions.deployment.fused_feed_forward import FusedFeedForward

EXPERIMENT = p08.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
EAGER = [arm for arm in ARMS if arm != "compiled"]  # compiling takes half a minute
WIDTH = 64
PLAN = TextPlan(1, 2, 2, batch_size=2, num_tested=9)
CPU = torch.device("cpu")


def bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(8, arm, "quick", 0), CPU, ModelCache(folder, "test"), lambda done: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p08._SIZES, "quick", p08._Size((WIDTH,), PLAN, seeds=1))
        return {arm: list(EXPERIMENT.measure(bench(arm, folder))) for arm in EAGER}


def value(found: list[Measurement], metric: str) -> float:
    (only,) = [m.value for m in found if m.metric == metric]
    return only


@pytest.mark.parametrize("arm", EAGER)
def test_every_arm_measures_all_that_is_shown(arm: str, measured: dict[str, list[Measurement]]) -> None:
    found = {m.metric for m in measured[arm]}
    assert {column.metric for column in EXPERIMENT.columns} | {EXPERIMENT.chart.metric} <= found
    assert EXPERIMENT.chart.x_metric in found
    assert sum(m.metric == "bits" for m in measured[arm]) == PLAN.num_tested


def test_counts_are_those_reckoned_by_hand(measured: dict[str, list[Measurement]]) -> None:
    weights = 4 * WIDTH**2 + 8 * WIDTH**2 + WIDTH * 257  # of a layer's matrices and the head
    scores = 2 * WINDOW * WIDTH  # of a token with all keys, and of its weights with all values
    flops = 2 * 1000 * (weights + scores)
    assert value(measured["float32"], "flops") == flops
    for arm in ("int8", "smooth_int8", "int4", "gptq", "magnitude", "wanda", "movement", "fused"):
        assert value(measured[arm], "flops") == flops
    halved = 2 * 1000 * (weights - 6 * WIDTH**2 + scores / 2)
    assert value(measured["structured"], "flops") == halved
    assert value(measured["fused"], "kernels") == value(measured["float32"], "kernels") - 2  # one product for three
    assert value(measured["int8"], "weight_bytes") < value(measured["float32"], "weight_bytes") / 2
    assert value(measured["int8"], "energy_j") < value(measured["float32"], "energy_j")
    assert sum(m.value for m in measured["int8"] if m.metric.startswith("layers_on_")) == 7


def test_energy_is_told_as_what_it_is(measured: dict[str, list[Measurement]]) -> None:
    results = Results([(Cell(8, arm, "quick", 0), m) for arm, found in measured.items() for m in found])
    counted = value(measured["float32"], "energy_is_counted")
    assert ("by the processor's counters" in EXPERIMENT.finding(results)) == bool(counted)
    assert any("Joules are an estimate" in note for note in EXPERIMENT.notes(results)) == (not counted)
    assert any("won the race for int8 products" in note for note in EXPERIMENT.notes(results))


def test_arms_are_what_they_say(tmp_path: Path) -> None:
    made = {arm: cheap_model(bench(arm, tmp_path), WIDTH, PLAN) for arm in ARMS}
    for arm, kind, num in (
        ("int8", Int8Linear, 7),
        ("smooth_int8", Int8Linear, 7),
        ("int4", Int4Linear, 7),
        ("gptq", Int4Linear, 7),
        ("fused", FusedFeedForward, 1),
        ("magnitude", SparseLinear, 7),
        ("wanda", SparseLinear, 7),
        ("movement", SparseLinear, 7),
        ("compiled", CompiledModel, 1),
    ):
        assert sum(isinstance(part, kind) for part in made[arm].modules()) == num
    for arm in ("magnitude", "wanda", "movement"):
        zeros = sum(int((part.weight == 0).sum()) for part in made[arm].modules() if isinstance(part, SparseLinear))
        total = sum(part.weight.numel() for part in made[arm].modules() if isinstance(part, SparseLinear))
        assert zeros == pytest.approx(total / 2, rel=0.01)
    tokens = text_models.thousand_tokens(CPU)
    assert tokens.numel() == 1000
    with torch.no_grad():
        torch.testing.assert_close(made["fused"](tokens), made["float32"](tokens), rtol=1e-4, atol=1e-5)
    assert not any(model.training for model in made.values())
    assert build_model("mobilebert", WIDTH, 2)(tokens).shape == (8, WINDOW, 257)


def test_no_tested_text_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    sample = text_models.sample_windows

    def look(data: Tensor, **keywords: object) -> Tensor:
        asked.append(data)
        return sample(data, **keywords)

    def train(model: nn.Module, batch_loss, plan, **keywords: object) -> None:
        loss: Tensor = batch_loss(model, 0)
        assert loss.isfinite()

    monkeypatch.setattr(text_models, "sample_windows", look)
    monkeypatch.setattr(text_models, "train", train)
    for arm in EAGER:
        if arm != "movement":  # it refuses to finish untrained
            cheap_model(bench(arm, tmp_path / arm), WIDTH, PLAN)
    assert asked
    train_text = load_text().train
    assert all(torch.equal(data, train_text) for data in asked)
