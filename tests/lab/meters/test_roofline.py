"""The roofline: known limits give known seconds and shares, and a fake clock gives known limits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters import roofline
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.lab.meters.latency import LatencySample
from transformer_problems.lab.meters.roofline import Roofline, measure_roofline

CPU = torch.device("cpu")
MACHINE = Roofline(flops_per_s=100.0, bytes_per_s=20.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes that take no time, and nothing remembered before or after."""
    monkeypatch.setitem(roofline._MATRIX_WIDTH, "cpu", 16)
    monkeypatch.setitem(roofline._ARRAY_BYTES, "cpu", 1024)
    measure_roofline.cache_clear()
    yield
    measure_roofline.cache_clear()


def test_the_slower_of_arithmetic_and_traffic_is_the_ceiling() -> None:
    assert MACHINE.ridge == 5.0
    assert MACHINE.ceiling_s(flops=400.0, bytes_moved=20.0) == 4.0  # 20 FLOPs a byte: arithmetic
    assert MACHINE.ceiling_s(flops=100.0, bytes_moved=60.0) == 3.0  # less than 5: memory
    assert MACHINE.ceiling_s(flops=100.0, bytes_moved=20.0) == 1.0  # both


def test_a_call_at_the_ceiling_reaches_all_of_it_and_one_of_twice_the_time_half() -> None:
    assert MACHINE.share(3.0, flops=100.0, bytes_moved=60.0) == 1.0
    assert MACHINE.share(6.0, flops=100.0, bytes_moved=60.0) == 0.5
    assert MACHINE.share(1.0, flops=0.0, bytes_moved=40.0) == 2.0  # half of the bytes came from a cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_the_counted_work_over_the_best_time(
    monkeypatch: pytest.MonkeyPatch, small: None, dtype: torch.dtype
) -> None:
    """The measured calls, counted by the other meters, over the shortest of planted times."""
    counted: list[tuple[int, int]] = []

    def planted(function: Callable[[], Tensor], *, device: torch.device, repeats: int) -> LatencySample:
        assert device == CPU and repeats > 1
        counted.append((count_flops(function), count_kernels(function).bytes_moved))
        return LatencySample((8.0, 4.0, 16.0))

    monkeypatch.setattr(roofline, "measure_latency", planted)
    found = measure_roofline(CPU, dtype)
    (no_flops, bytes_moved), (flops, _) = counted
    assert (flops, no_flops, bytes_moved) == (2 * 16**3, 0, 2 * 1024)
    assert found == Roofline(flops / 4.0, bytes_moved / 4.0)


def test_a_clock_of_one_second_a_reading_gives_known_limits(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    readings = iter(range(1000))
    monkeypatch.setattr("transformer_problems.lab.meters.latency.perf_counter", lambda: float(next(readings)))
    assert measure_roofline(CPU, torch.float32) == Roofline(2 * 16**3, 2 * 1024)


def test_it_is_measured_once_a_process_for_each_dtype(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    calls = 0

    def counting(function: object, **kwargs: object) -> LatencySample:
        nonlocal calls
        calls += 1
        return LatencySample((1.0,))

    monkeypatch.setattr(roofline, "measure_latency", counting)
    assert measure_roofline(CPU, torch.float32) is measure_roofline(CPU, torch.float32)
    assert calls == 2
    measure_roofline(CPU, torch.bfloat16)
    assert calls == 4


@pytest.mark.gpu
def test_a_gpu_has_limits_too() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = measure_roofline(torch.device("cuda"), torch.bfloat16)
    assert found.flops_per_s > found.bytes_per_s > 0


def test_what_cannot_be_measured_is_refused() -> None:
    for call, message in (
        (lambda: Roofline(0.0, 1.0), "flops_per_s must be positive; got 0.0"),
        (lambda: Roofline(1.0, -1.0), "bytes_per_s must be positive; got -1.0"),
        (lambda: MACHINE.share(0.0, 1.0, 1.0), "time_s must be positive; got 0.0"),
        (
            lambda: measure_roofline(torch.device("meta"), torch.float32),
            "device must be a torch.device of type cpu or cuda; got device",
        ),
        (lambda: measure_roofline("cpu", torch.float32), "device must be a torch.device of .*; got 'cpu'"),
        (lambda: measure_roofline(CPU, torch.int8), "dtype must be float32, .*; got torch.int8"),
        (lambda: measure_roofline(CPU, torch.float8_e4m3fn), "dtype must be float32, .*; got torch.float8_e4m3fn"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
