"""Problem 10: every arm measures what is shown, spikes are planted, diverged runs count and do not stop a cell."""

import math
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import DivergedError
from transformer_problems.core.records import Cell, Measurement
from transformer_problems.core.seeding import generator
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p10_training_instability import experiment as p10
from transformer_problems.solutions.attention.self_attention import SelfAttention

EXPERIMENT = p10.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
RATES = (1e-3, 1e-2)
TINY = p10._Size(RATES, 8, 2, steps=3, batch_size=2, num_windows=4, seeds=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p10._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(10, arm, "quick", 0), torch.device("cpu"), ModelCache(folder, "test"), lambda done: None)


def _value(measurements: list[Measurement], metric: str, x: float | None = None) -> float:
    return next(m.value for m in measurements if (m.metric, m.x) == (metric, x))


def _windows() -> torch.Tensor:
    return torch.randint(256, (4, 20), generator=generator(0))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, rate) for rate in RATES}
    assert shown <= found


def test_sensitivity_is_the_mean_excess_over_the_own_best(measured: dict[str, list[Measurement]]) -> None:
    losses = [_value(measured["post_norm"], "bits_per_byte", rate) for rate in RATES]
    assert _value(measured["post_norm"], "best_bits_per_byte") == min(losses)
    excess = sum(losses) / len(losses) - min(losses)
    assert _value(measured["post_norm"], "learning_rate_sensitivity") == pytest.approx(excess)


@pytest.mark.parametrize("size", ["quick", "standard", "full"])
def test_learning_rates_span_three_decades(size: str) -> None:
    rates = p10._SIZES[size].rates  # type: ignore[index]
    assert rates[-1] / rates[0] >= 1000 * (1 - 1e-9)
    assert math.isclose(rates[1] / rates[0], rates[-1] / rates[-2])


def test_spikes_reach_the_loss_at_their_steps_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}

    def note(model, batch_loss, plan, **options):
        losses[arm] = [batch_loss(model, step).item() for step in range(2 * p10._SPIKE_EVERY)]

    monkeypatch.setattr(p10, "train", note)
    monkeypatch.setitem(p10._SIZES, "quick", TINY)
    for arm in ("post_norm", "spiked"):
        list(EXPERIMENT.measure(_bench(arm, tmp_path)))
    ratios = [spiked / plain for plain, spiked in zip(losses["post_norm"], losses["spiked"], strict=True)]
    at = [i for i, ratio in enumerate(ratios) if ratio > 2]
    assert at == [p10._SPIKE_EVERY - 1, 2 * p10._SPIKE_EVERY - 1]
    assert ratios[at[0]] == pytest.approx(p10._SPIKE, rel=1e-4)


def test_a_diverged_run_counts_at_the_untrained_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def diverge(*args, **options):
        raise DivergedError("planted")

    monkeypatch.setattr(p10, "train", diverge)
    monkeypatch.setitem(p10._SIZES, "quick", TINY)
    found = list(EXPERIMENT.measure(_bench("post_norm", tmp_path)))
    assert _value(found, "diverged_share") == 1.0
    assert _value(found, "learning_rate_sensitivity") == 0.0
    assert _value(found, "best_bits_per_byte") == pytest.approx(_value(found, "bits_per_byte", RATES[0]))


def test_the_largest_logit_equals_the_dense_one() -> None:
    model = p10.build_model("pre_norm", 8, 1)
    windows = _windows()
    block = model.body.blocks[0]
    mixer = block.mixer
    assert isinstance(mixer, SelfAttention)
    with torch.no_grad():
        x = block.mixer_residual.norm(model.body.embed(windows[:2, :-1], torch.arange(19)))  # what is looked at
        q, k = (proj(x).unflatten(-1, (p10._HEADS, -1)).transpose(1, 2) for proj in (mixer.q_proj, mixer.k_proj))
        q, k = mixer.position.rotate(q, k, torch.arange(19), torch.arange(19))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).abs().masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), 0)
    assert p10.largest_logit(model, windows[:2]) == pytest.approx(float(scores.max()), rel=1e-5)  # float32


def test_gradients_at_the_start_are_those_of_the_second_matrices() -> None:
    model, windows = p10.build_model("post_norm", 8, 3), _windows()
    found = [m.value for m in p10.gradients_at_start(model, windows) if m.metric == "gradient_norm"]
    weights = [block.feed_forward.down.weight for block in model.body.blocks]
    expected = torch.autograd.grad(p10.next_byte_loss(model, windows), weights)
    assert found == pytest.approx([float(gradient.norm()) for gradient in expected], rel=1e-5)


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    finding = EXPERIMENT.finding(Results([(Cell(10, "post_norm", "quick", 0), m) for m in measured["post_norm"]]))
    assert f"{_value(measured['post_norm'], 'best_bits_per_byte'):.2f} bits per byte" in finding
