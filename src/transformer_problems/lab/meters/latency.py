"""How long a call takes."""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from transformer_problems.core.arguments import require_positive, require_positive_int


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Seconds per call, one figure a repeat, in the order they were taken."""

    times_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return float(np.median(self.times_s))

    @property
    def spread_s(self) -> float:
        """Interquartile range: the width of the middle half of the repeats."""
        low, high = np.percentile(self.times_s, [25, 75])
        return float(high - low)


def measure_latency(
    function: Callable[[], object],
    *,
    device: torch.device | str,
    repeats: int = 7,
    warmup: int = 2,
    min_time_s: float = 0.02,
) -> LatencySample:
    """Wall-clock seconds of one call, measured `repeats` times.

    Each repeat calls the function as often as fills `min_time_s`, so that calls far shorter than the clock's
    resolution are measured too; a longer call runs once a repeat. Garbage collection is off while the clock
    runs. On CUDA the clock waits for the device's queued work at both ends of a repeat, so what is timed within
    a repeat is throughput: calls may overlap launch and execution as they do in use. PyTorch's own
    `torch.utils.benchmark.Timer` is not used because it runs every block three times over when one call fills
    it, and sets the number of threads.

    Args:
        device: Where the function works; "cuda" synchronises.
        repeats: Independent measurements.
        warmup: Calls before the first measurement, at least one, which no figure includes.
        min_time_s: Shortest time a repeat may take.

    Raises:
        ArgumentError: If a count or time is not positive.
    """
    require_positive_int(repeats=repeats, warmup=warmup)
    require_positive(min_time_s=min_time_s)
    timer = timeit.Timer(function, timer=_clock(torch.device(device)))
    for _ in range(warmup):
        function()
    num_calls = _calls_to_fill(min_time_s, timer)
    return LatencySample(tuple(time_s / num_calls for time_s in timer.repeat(repeats, num_calls)))


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device before it is read."""
    if device.type != "cuda":
        return perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return synchronised


def _calls_to_fill(min_time_s: float, timer: timeit.Timer) -> int:
    """The first power of two whose loop takes long enough."""
    num_calls = 1
    while timer.timeit(num_calls) < min_time_s:
        num_calls *= 2
    return num_calls
