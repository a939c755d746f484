"""Problem 12: every arm measures what the page shows, and streams cost the same however long they are."""

from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p12_no_recurrence import experiment as p12

EXPERIMENT = p12.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
TINY = p12._Size((64, 128, 256, 512), 2, 16, 2, steps=2, batch_size=2, num_windows=2, seeds=1)
FLAT = {"window_only", "transformer_xl", "chunked", "attention_sinks", "memory_bank", "delta_rule", "continual"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p12._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(12, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _by_x(measurements: list[Measurement], metric: str) -> dict[float | None, float]:
    return {m.x: m.value for m in measurements if m.metric == metric}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns if c.statistic == "mean"}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown.add((EXPERIMENT.chart.metric, "last"))
    last = float(TINY.histories[-1])
    assert {(metric, last if at == "last" else at) for metric, at in shown} <= found


@pytest.mark.parametrize("arm", sorted(FLAT))
def test_a_streamed_token_costs_the_same_after_any_history(measured: dict[str, list[Measurement]], arm: str) -> None:
    for metric in ("flops", "state_bytes"):
        costs = _by_x(measured[arm], metric)
        assert costs[128] == costs[256] == costs[512] > 0


def test_recomputing_grows_and_a_cache_grows_less(measured: dict[str, list[Measurement]]) -> None:
    again, cached = (_by_x(measured[arm], "flops") for arm in ("recompute", "kv_cache"))
    assert again[512] > 2 * again[256]  # tokens double, and each attends to twice as many
    assert cached[256] < cached[512] < 2 * cached[256]
    state = _by_x(measured["kv_cache"], "state_bytes")
    assert state[512] == 2 * state[256]


@pytest.mark.parametrize("arm", ARMS)
def test_streamed_equals_whole(measured: dict[str, list[Measurement]], arm: str) -> None:
    difference = _by_x(measured[arm], "streamed_difference")[None]
    # float32 rounds at 1.2e-7; logits are sums over 2 layers of some hundred terms, and softmax and norms amplify.
    assert difference < 1e-4


def test_arms_of_one_model_share_its_weights(measured: dict[str, list[Measurement]]) -> None:
    again, cached = (
        [m.value for m in measured[arm] if m.metric == "bits_per_byte"] for arm in ("recompute", "kv_cache")
    )
    assert again == cached


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    arms = ("recompute", "window_only", "attention_sinks")
    records = [(Cell(12, arm, "quick", 0), m) for arm in arms for m in measured[arm]]
    finding = EXPERIMENT.finding(Results(records))
    assert "After 512 tokens" in finding
    assert "times the arithmetic" in finding
    assert "with sinks kept" in finding
    alone = EXPERIMENT.finding(Results([record for record in records if record[0].arm == "recompute"]))
    assert alone in finding


def test_the_finding_tells_what_a_cache_costs(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(12, "recompute", "quick", 0), m) for m in measured["recompute"]]
    for x, seconds in ((64.0, 1.0), (512.0, 1.5)):
        records.append((Cell(12, "kv_cache", "quick", 0), Measurement("latency_s", "s", seconds, x)))
    records.append((Cell(12, "kv_cache", "quick", 0), Measurement("state_bytes", "bytes", 3 * 2**20, 512.0)))
    assert "With a full KV cache it takes 1.5 times as long, and 3 MiB are kept." in EXPERIMENT.finding(
        Results(records)
    )


@pytest.mark.parametrize(
    ("alone", "outcome"), [(3.0, "was not reproduced"), (5.5, "without sinks the window loses 2.50")]
)
def test_the_finding_tells_whether_a_bare_window_collapsed(
    measured: dict[str, list[Measurement]], alone: float, outcome: str
) -> None:
    records = [(Cell(12, "recompute", "quick", 0), m) for m in measured["recompute"]]
    for arm, bits in (("window_only", alone), ("attention_sinks", 3.0)):
        records.append((Cell(12, arm, "quick", 0), Measurement("bits_per_byte", "bit", bits, 512.0)))
    assert outcome in EXPERIMENT.finding(Results(records))


def test_notes_tell_what_time_holds_beside_arithmetic(measured: dict[str, list[Measurement]]) -> None:
    cell = Cell(12, "recompute", "quick", 0)
    flops = [(cell, Measurement("flops", "FLOP", value, x)) for x, value in ((64.0, 1e9), (128.0, 4e9))]
    seconds = [(64.0, 0.5, 0), (64.0, 0.5, 1), (128.0, 5.0, 0), (128.0, 7.0, 1)]
    records = [*flops, *((cell, Measurement("latency_s", "s", v, x, repeat=r)) for x, v, r in seconds)]
    time, budget = EXPERIMENT.notes(Results(records))
    assert "From 64 to 128 tokens arithmetic grows 4.0 times and time 12.0 times, and the 2 repeats at 128" in time
    assert "5.0 to 7.0 s" in time
    assert f"{p12._SIZES['quick'].steps} steps of" in budget
    alone = EXPERIMENT.notes(Results([(Cell(12, "kv_cache", "quick", 0), measured["kv_cache"][0])]))
    assert "arithmetic grows" not in alone[0]
