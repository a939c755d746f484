"""Races of several ways to compute the same: run once for each kind of call, remembered, and open to inspection."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from transformer_problems.core.errors import KernelBuildError

_Name = TypeVar("_Name", bound=str)
_RUNS = 3
_RACED: dict[tuple[object, ...], dict[str, float]] = {}


def fastest(
    kind: tuple[object, ...],
    prepare: Callable[[], Mapping[str, Callable[[], object]]],
    device: torch.device,
    *,
    clear_lead: float = 1.2,
) -> str:
    """The way with the best of some runs, which take turns; asked again for the same kind of call, it is looked up.

    The first way named is the one to keep in doubt: another is taken only with a clear lead, so that chance decides
    neither speed nor, from run to run, the last bits of a result. It runs in a thread of its own, where no meter,
    tracer or autocast of the caller's sees it.

    Args:
        kind: What tells calls apart that may have different winners.
        prepare: Makes what to race, by name; called for a race alone. One that raises KernelBuildError loses.
        device: Where they compute.
        clear_lead: How many times faster than the first another way must be.
    """
    if kind not in _RACED:
        num_threads = torch.get_num_threads()
        with ThreadPoolExecutor(1) as thread:
            _RACED[kind] = thread.submit(_race, prepare, device, num_threads).result()
    times = _RACED[kind]
    first = next(iter(times))
    best = min(times, key=lambda name: times[name])
    return best if times[first] >= clear_lead * times[best] else first


def raced() -> dict[tuple[object, ...], dict[str, float]]:
    """Seconds of each way, by the kind of call, of the races run so far; infinite where a way cannot be had."""
    return {kind: dict(times) for kind, times in _RACED.items()}


def _race(
    prepare: Callable[[], Mapping[str, Callable[[], object]]], device: torch.device, num_threads: int
) -> dict[str, float]:
    torch.set_num_threads(num_threads)  # a thread's own setting
    return best_times(prepare(), device)


def best_times(
    ways: Mapping[_Name, Callable[[], object]], device: torch.device, *, num_runs: int = _RUNS
) -> dict[_Name, float]:
    """Seconds of the best of some runs of each way, which take turns; infinite where a kernel cannot be built."""
    best_s = dict.fromkeys(ways, math.inf)
    for attempt in range(num_runs + 1):
        for name, way in ways.items():
            try:
                start = _now(device)
                way()
                passed_s = _now(device) - start
            except KernelBuildError:
                continue
            if attempt:  # the first run warms up
                best_s[name] = min(best_s[name], passed_s)
    return best_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
