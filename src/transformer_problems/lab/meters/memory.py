"""How much memory a call needs at its worst moment."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from transformer_problems.core.errors import ArgumentError


def peak_memory_bytes(function: Callable[[], object], *, device: torch.device | str) -> int:
    """The most bytes that were allocated at once during one call, beyond those allocated before it.

    Exact, from the allocator: on CUDA its own peak counter (sizes rounded up to its 512-byte blocks), on the
    CPU every allocation and release that the profiler records, replayed in order. Counted is what PyTorch
    allocates: tensors, saved activations, gradients, the scratch that operators take as tensors. Not counted
    is memory taken behind the allocator's back (libraries' own buffers, NumPy arrays, Python objects).

    A release of memory allocated before the call does not lower the CPU figure, whose allocator forgets sizes
    from before, but lowers the CUDA one; let the function release only what it allocated where the two meet.
    Recording slows a call made of tiny operators several times over, so take latency in a call of its own.

    Args:
        function: Called once, without arguments; its result is dropped.
        device: "cpu" or "cuda".

    Raises:
        ArgumentError: If the device is of another type.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak(function, device)
    if device.type == "cpu":
        return _cpu_peak(function)
    raise ArgumentError(
        f"device must be cpu or cuda, whose allocators report peaks; got {device}. Measure memory on one of them."
    )


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(function: Callable[[], object]) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results
    return _replayed_peak(_allocations(results.experimental_event_tree()))


def _allocations(roots: list[_ProfilerEvent]) -> list[tuple[int, int]]:
    """(address, signed bytes) of every CPU allocation and release, in order of time.

    The event tree is read in place of the flat event list because only it gives addresses.
    """
    found, pending = [], roots[::-1]
    while pending:
        event = pending.pop()
        pending.extend(event.children[::-1])
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda item: item[0])
    return [(address, num_bytes) for _, address, num_bytes in found]


def _replayed_peak(allocations: Iterable[tuple[int, int]]) -> int:
    """The highest sum of live bytes.

    A release counts only with its allocation, and with that allocation's size: the allocator's table can
    hold stale sizes of addresses that changed hands while nobody was profiling.
    """
    live: dict[int, int] = {}
    total = peak = 0
    for address, num_bytes in allocations:
        total -= live.pop(address, 0)
        if num_bytes > 0:
            live[address] = num_bytes
            total += num_bytes
            peak = max(peak, total)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library from writing two lines to stderr a call; it reads its level on first use."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
