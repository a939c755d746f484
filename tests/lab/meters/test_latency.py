"""The latency meter: what it calls and reports. Speeds themselves are never asserted."""

import gc

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.latency import LatencySample, measure_latency


def test_median_and_spread_are_the_textbook_ones():
    sample = LatencySample((1.0, 2.0, 3.0, 4.0, 100.0))
    assert sample.median_s == 3.0
    assert sample.spread_s == 2.0  # quartiles 2 and 4: the outlier does not count


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_positive_time_a_repeat(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.ones(8, 8, device=device)
    sample = measure_latency(lambda: x @ x, device=device, repeats=4, min_time_s=1e-4)
    assert len(sample.times_s) == 4
    assert all(time_s > 0 for time_s in sample.times_s)


def test_times_are_per_call_and_short_calls_are_looped(monkeypatch):
    """A clock that advances one second a call makes every figure exactly one second."""
    calls = 0

    def function():
        nonlocal calls
        calls += 1

    monkeypatch.setattr("transformer_problems.lab.meters.latency.perf_counter", lambda: float(calls))
    sample = measure_latency(function, device="cpu", repeats=3, warmup=2, min_time_s=5.0)
    assert sample.times_s == (1.0, 1.0, 1.0)
    assert calls == 2 + (1 + 2 + 4 + 8) + 3 * 8  # warm-up, calibration up to the first loop of 5 s, repeats


def test_a_long_call_runs_once_a_repeat(monkeypatch):
    calls = 0

    def function():
        nonlocal calls
        calls += 1

    monkeypatch.setattr("transformer_problems.lab.meters.latency.perf_counter", lambda: 10.0 * calls)
    measure_latency(function, device="cpu", repeats=3, warmup=1, min_time_s=5.0)
    assert calls == 1 + 1 + 3


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_and_restored(enabled):
    seen = []
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        measure_latency(lambda: seen.append(gc.isenabled()), device="cpu", repeats=2, warmup=1, min_time_s=1e-6)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert not any(seen[1:])  # the first call is the warm-up


def test_a_failing_function_leaves_garbage_collection_on():
    calls = 0

    def function():
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        measure_latency(function, device="cpu", warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize("argument", ["repeats", "warmup", "min_time_s"])
def test_counts_and_times_must_be_positive(argument):
    with pytest.raises(ArgumentError, match=argument):
        measure_latency(lambda: None, device="cpu", **{argument: 0})


@pytest.mark.parametrize("argument", ["repeats", "warmup"])
def test_counts_must_be_whole(argument):
    with pytest.raises(ArgumentError, match=f"{argument} must be a positive whole number; got 1.5"):
        measure_latency(lambda: None, device="cpu", **{argument: 1.5})
