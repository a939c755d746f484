"""Problem 17: every arm is the same layer, counts are those reckoned by hand, and notes tell what answered."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Cell, Measurement, Scale
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.roofline import Roofline
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p17_hardware_inefficiency import experiment as p17

EXPERIMENT = p17.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
LENGTHS = (64, 96)
SCALES: list[Scale] = ["quick", "standard", "full"]
CPU = torch.device("cpu")
MACHINE = Roofline(flops_per_s=1e12, bytes_per_s=1e11)
WIDTH, HEADS = 32, 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size, on a machine whose limits are known."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        _shrink(patch)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(p17._SIZES, "quick", p17._Size(LENGTHS, repeats=2, seeds=1))
    patch.setattr(p17, "_WIDTH", WIDTH)
    patch.setattr(p17, "_HEADS", HEADS)
    patch.setattr(p17, "measure_roofline", lambda device, dtype: MACHINE)


def _bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(17, arm, "quick", 0), CPU, ModelCache(folder, "test"), lambda done: None)


def _by_x(measurements: list[Measurement], metric: str) -> dict[float | None, list[float]]:
    found: dict[float | None, list[float]] = {}
    for m in measurements:
        if m.metric == metric:
            found.setdefault(m.x, []).append(m.value)
    return found


def _results(measured: dict[str, list[Measurement]], *arms: str) -> Results:
    return Results([(Cell(17, arm, "quick", 0), m) for arm in arms for m in measured[arm]])


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_measures_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(column.metric, column.at) for column in EXPERIMENT.columns}
    shown |= {(effect.metric, effect.at) for effect in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    assert {(metric, LENGTHS[-1] if at == "last" else at) for metric, at in shown} <= found
    assert set(_by_x(measured[arm], EXPERIMENT.chart.metric)) == set(LENGTHS)


@pytest.mark.parametrize("scale", SCALES)
def test_lengths_double_from_the_one_that_columns_name(scale: Scale) -> None:
    lengths = p17._SIZES[scale].lengths
    assert lengths[0] == 64 and all(b == 2 * a for a, b in pairwise(lengths))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_computes_the_same(measured: dict[str, list[Measurement]], arm: str) -> None:
    for (difference,) in _by_x(measured[arm], "difference").values():
        assert 0 < difference < 1e-5  # float32 rounds at 6e-8, in sums of up to a hundred numbers


def test_all_arms_hold_the_same_weights() -> None:
    sums = []
    for arm in ARMS:
        torch.manual_seed(0)
        sums.append(sum(float(p.detach().double().sum()) for p in p17.build_layer(arm).parameters()))
    assert sums == pytest.approx([sums[0]] * len(sums))


def test_flops_are_those_reckoned_by_hand(measured: dict[str, list[Measurement]]) -> None:
    for n in LENGTHS:
        projections, product = 8 * n * WIDTH**2, 2 * n * n * WIDTH
        assert _by_x(measured["eager"], "flops")[n] == [3 * (projections + 2 * product)]
        assert _by_x(measured["kernel"], "flops")[n] == [3 * (projections + 2 * product)]
        for arm in ("flash", "fused"):  # which form the scores again
            assert _by_x(measured[arm], "flops")[n] == [3 * projections + 7 * product]


def test_fused_arms_launch_fewer_kernels_and_move_fewer_bytes(measured: dict[str, list[Measurement]]) -> None:
    for metric in ("kernels", "bytes_moved"):
        (eager,) = _by_x(measured["eager"], metric)[LENGTHS[-1]]
        for arm in ("flash", "fused", "kernel"):
            assert _by_x(measured[arm], metric)[LENGTHS[-1]] < [eager]
    assert _by_x(measured["fused"], "kernels")[LENGTHS[-1]] <= [3.0]  # forward, backward, and grad_qkv's zeros


@pytest.mark.parametrize("arm", ARMS)
def test_shares_are_the_ceilings_seconds_over_those_measured(measured: dict[str, list[Measurement]], arm: str) -> None:
    for n in LENGTHS:
        flops = 3 * (8 * n * WIDTH**2 + 4 * WIDTH * n * (n + 1) // 2)
        numbers = 5 * n * WIDTH + 12 * WIDTH**2
        least_s = max(flops / 1e12, 4 * numbers / 1e11)
        times_s = _by_x(measured[arm], "seconds")[n]
        assert _by_x(measured[arm], "share")[n] == pytest.approx([least_s / t for t in times_s])
        own_s = max(_by_x(measured[arm], "flops")[n][0] / 1e12, _by_x(measured[arm], "bytes_moved")[n][0] / 1e11)
        assert _by_x(measured[arm], "own_share")[n] == pytest.approx([own_s / t for t in times_s])


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    finding = EXPERIMENT.finding(_results(measured, "eager"))
    (kernels,) = _by_x(measured["eager"], "kernels")[LENGTHS[-1]]
    assert f"{kernels:.0f} of them forward and backward" in finding
    assert "at 96 tokens, where this machine needs 10 to be limited" in finding
    assert "at 64 tokens and" in finding


def test_notes_tell_what_answered(measured: dict[str, list[Measurement]]) -> None:
    notes = " ".join(EXPERIMENT.notes(_results(measured, *ARMS)))
    assert "xFormers' operator needs CUDA and the package, and did not run" in notes
    assert "1,000 GFLOP/s" in notes and "100.0 GB/s" in notes
    assert "in place of the kernels" not in notes
    cell = Cell(17, "xformers", "quick", 0)
    by_xformers = EXPERIMENT.notes(Results([(cell, Measurement("by_own_path", "1", 0))]))
    assert "xFormers' operator answered its call." in by_xformers
    by_torch = EXPERIMENT.notes(Results([(Cell(17, "fused", "quick", 0), Measurement("by_own_path", "1", 1))]))
    assert "PyTorch's operators answered in place of the kernels of: fused." in by_torch
