"""What a machine can do at best, arithmetic and memory traffic, and how near to that a call comes."""

from dataclasses import dataclass
from functools import cache

import torch

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.latency import measure_latency

_MATRIX_WIDTH = {"cpu": 2048, "cuda": 8192}
_ARRAY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # last caches hold some tens of MB, a GPU's about 50
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Roofline:
    """The two limits of a machine: no call does more arithmetic a second, nor moves more bytes.

    Args:
        flops_per_s: Peak arithmetic, FLOP/s; a multiply-add is 2 FLOPs.
        bytes_per_s: Peak traffic to and from main memory, bytes read plus bytes written a second.

    Raises:
        ArgumentError: If one is not positive.

    Source:
        Williams et al. 2009, doi:10.1145/1498765.1498785.
    """

    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        require_positive(flops_per_s=self.flops_per_s, bytes_per_s=self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """FLOPs for each byte moved below which memory is the limit, and above which arithmetic is."""
        return self.flops_per_s / self.bytes_per_s

    def ceiling_s(self, flops: float, bytes_moved: float) -> float:
        """The least seconds that so much work takes: those of its arithmetic or of its traffic, whichever are more."""
        return max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)

    def share(self, time_s: float, flops: float, bytes_moved: float) -> float:
        """The part of the machine's ceiling that a call of `time_s` seconds reached.

        Above 1 where bytes were counted that a cache served.

        Raises:
            ArgumentError: If the time is not positive.
        """
        require_positive(time_s=time_s)
        return self.ceiling_s(flops, bytes_moved) / time_s


@cache
def measure_roofline(device: torch.device, dtype: torch.dtype, *, array_bytes: int | None = None) -> Roofline:
    """The limits of this machine, measured once a process: some seconds on a CPU.

    Arithmetic by the product of two large square matrices in `dtype`, traffic by a copy between arrays far larger than
    the last cache, each the best of some repeats. They hold for the threads and the precision of matrix products that
    PyTorch is set to at the first call, and for what the machine's other processes leave.

    Args:
        dtype: Of the matrices; a bfloat16 product may be faster or slower than a float32 one.
        array_bytes: As of `measure_bandwidth`.

    Raises:
        ArgumentError: If the device is neither a CPU nor CUDA, or the dtype none of float32, float64, bfloat16 and
            float16. Of a narrower one PyTorch multiplies on a CPU number by number, for hours.
    """
    if not isinstance(device, torch.device) or device.type not in _MATRIX_WIDTH:
        raise ArgumentError(
            f"device must be a torch.device of type cpu or cuda; got {device!r}. Measure on one of these."
        )
    if dtype not in _DTYPES:
        raise ArgumentError(
            f"dtype must be float32, float64, bfloat16 or float16, in which matrices are multiplied; got {dtype}. "
            "Choose torch.float32 or torch.bfloat16."
        )
    bytes_per_s = measure_bandwidth(device, array_bytes=array_bytes)  # first: what it took goes back to the system
    return Roofline(_peak_flops_per_s(device, dtype), bytes_per_s)


@torch.no_grad()
def _peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    width = _MATRIX_WIDTH[device.type]
    draws = torch.Generator(device).manual_seed(0)  # a product of constants would draw less power, and run faster
    a, b = (torch.rand(width, width, device=device, generator=draws).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    times_s = measure_latency(lambda: torch.mm(a, b, out=product), device=device, repeats=_REPEATS).times_s
    return 2 * width**3 / min(times_s)


@torch.no_grad()
def measure_bandwidth(device: torch.device, *, array_bytes: int | None = None) -> float:
    """Peak traffic to and from main memory, bytes read plus bytes written a second: of a copy larger than caches.

    Args:
        array_bytes: Of each of the two arrays; smaller ones may lie in a large cache. Default 256 MiB, 1 GiB on CUDA.

    Raises:
        ArgumentError: If the device is neither a CPU nor CUDA.
    """
    if device.type not in _ARRAY_BYTES:
        raise ArgumentError(f"device must be of type cpu or cuda; got {device.type}. Measure on one of these.")
    num_bytes = array_bytes or _ARRAY_BYTES[device.type]
    source = torch.ones(num_bytes, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times_s = measure_latency(lambda: target.copy_(source), device=device, repeats=_REPEATS).times_s
    return 2 * num_bytes / min(times_s)
