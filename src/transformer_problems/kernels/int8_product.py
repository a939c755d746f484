"""Products of float rows with int8 matrices: the ways that this machine has, raced once for each size."""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.core.arguments import require_finite, require_positive
from transformer_problems.core.errors import (
    ArgumentError,
    KernelBuildError,
    MissingDependencyError,
    UnknownNameError,
)
from transformer_problems.core.inputs import shown
from transformer_problems.kernels.compiler import load
from transformer_problems.kernels.race import best_times

Int8Backend = Literal["cpp", "int_mm", "float"]
"""Our C++ kernel; PyTorch's int8 matrix product (oneDNN or cuBLAS); or the matrix made float again."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_WEIGHTS_PER_WORKER = 2**17
_LARGEST_INPUT = 2**16  # products of 127 * 255, so many summed, still fit an int32
_RACES = 5
_ROW_CLASSES = (1, 4, 16, 64, 256)


@cache
def int8_backends(device: str) -> tuple[Int8Backend, ...]:
    """The back ends that a type of device ("cpu", "cuda") has here."""
    found: list[Int8Backend] = []
    if device == "cpu":
        try:
            _kernel("int8_product")
            found.append("cpp")
        except (KernelBuildError, MissingDependencyError):  # raced without it; `int8_backends` tells
            pass
    if hasattr(torch, "_int_mm"):
        found.append("int_mm")
    return (*found, "float")


def int8_product(
    x: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    x_scale: float | None = None,
    backend: Int8Backend | Literal["auto"] = "auto",
) -> Tensor:
    """x (weight * scales)^T + bias with x rounded to int8: by each row's largest value, or by one given scale.

    Sums are exact in int32, so back ends differ by the rounding of the last multiplication alone, but for "float",
    whose sums are float32.

    Args:
        weight_sums: Sum of each row of `weight`.
        x_scale: The size of a step of x; None takes each row's largest magnitude divided by 127.
        backend: "auto" is the fastest of a race that is run once for each size; see `raced`.

    Shape:
        x: [rows, I] float32; weight: [O, I] int8; weight_sums: [O] int32; scales, bias: [O] float32; output: [rows, O].

    Raises:
        UnknownNameError: If there is no such back end here.
        ArgumentError: If tensors are of other shapes, dtypes or devices, `x_scale` is not positive, or I is so large
            that sums could overflow.
    """
    _check(x, weight, weight_sums, scales, bias)
    if x_scale is not None:
        require_positive(x_scale=x_scale)
        require_finite(x_scale=x_scale)
    run = _OPERATOR if torch.compiler.is_compiling() or _len_torch_dispatch_stack() else _product
    x, weight, weight_sums, scales = (t.contiguous() for t in (x, weight, weight_sums, scales))
    added = None if bias is None else bias.contiguous()
    y: Tensor = run(x, weight, weight_sums, scales, added, x_scale or 0.0, backend)
    return y


def _check(x: Tensor, weight: Tensor, weight_sums: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or weight.dim() != 2:
        raise ArgumentError(f"weight must be int8 [O, I]; got {shown(weight)}. Quantize a layer by Int8Linear.")
    (outputs, inputs), device = weight.shape, weight.device
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != inputs:
        raise ArgumentError(f"x must be float32 [rows, {inputs}]; got {shown(x)}. Pass x.float(), its rows flattened.")
    if inputs > _LARGEST_INPUT:
        raise ArgumentError(f"inputs must be at most {_LARGEST_INPUT:,} for exact sums; got {inputs:,}.")
    vectors = (
        ("weight_sums", weight_sums, torch.int32),
        ("scales", scales, torch.float32),
        ("bias", bias, torch.float32),
    )
    for name, vector, dtype in vectors:
        if vector is None and name == "bias":
            continue
        if not isinstance(vector, Tensor) or vector.dtype != dtype or vector.shape != (outputs,):
            raise ArgumentError(f"{name} must be {dtype} [{outputs}], one for each output; got {shown(vector)}.")
        if vector.device != device:
            raise ArgumentError(f"{name} must be on {device}, as the weight; got {vector.device}. Move it there.")
    if x.device != device:
        raise ArgumentError(f"x must be on {device}, as the weight; got {x.device}. Move one of them.")


_RACED: dict[tuple[object, ...], dict[Int8Backend, float]] = {}


def raced() -> dict[tuple[object, ...], dict[Int8Backend, float]]:
    """Seconds of each back end, by (device, rows, outputs, inputs, threads), of the races run so far."""
    return {key: dict(times) for key, times in _RACED.items()}


def fastest(x: Tensor, weight: Tensor) -> Int8Backend:
    """The back end that won the race for this size: rows are raced as the next of 1, 4, 16, 64 and 256."""
    outputs, inputs = weight.shape
    rows = next((size for size in _ROW_CLASSES if size >= len(x)), _ROW_CLASSES[-1])
    key = (x.device.type, rows, outputs, inputs, torch.get_num_threads())
    if key not in _RACED:
        _RACED[key] = _race(rows, weight)
    times = _RACED[key]
    return min(times, key=lambda name: times[name])


@torch.no_grad()
def _race(rows: int, weight: Tensor) -> dict[Int8Backend, float]:
    """Seconds of each back end."""
    x = torch.linspace(-1, 1, rows * weight.shape[1], device=weight.device).view(rows, -1)
    sums, scales = weight.sum(dim=1, dtype=torch.int32), torch.ones(len(weight), device=weight.device)
    ways = {
        backend: partial(_OPERATOR, x, weight, sums, scales, None, 0.0, backend)
        for backend in int8_backends(weight.device.type)
    }
    return best_times(ways, weight.device, num_runs=_RACES)


def _product(
    x: Tensor, weight: Tensor, weight_sums: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float, backend: str
) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(weight))
    chosen = fastest(x, weight) if backend == "auto" else backend
    known = int8_backends(x.device.type)
    if chosen not in known:
        raise UnknownNameError("int8 back end on this machine", chosen, known)
    return _WAYS[chosen](x, weight, weight_sums, scales, bias, x_scale)


def _by_cpp(
    x: Tensor, weight: Tensor, weight_sums: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float
) -> Tensor:
    (rows, inputs), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    workers = max(1, min(torch.get_num_threads(), rows * weight.numel() // _WEIGHTS_PER_WORKER))
    read = [t.data_ptr() for t in (x, weight, weight_sums, scales)]
    added = None if bias is None else bias.data_ptr()
    _kernel("int8_product")(*read, added, y.data_ptr(), rows, inputs, outputs, workers, x_scale)
    return y


def _by_int_mm(
    x: Tensor, weight: Tensor, weight_sums: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float
) -> Tensor:
    rounded, row_scales = _rounded(x, x_scale)
    sums = torch._int_mm(_enough_rows(rounded), weight.t())[: len(x)]
    y = sums.float().mul_(row_scales * scales)
    return y if bias is None else y.add_(bias)


def _by_float(
    x: Tensor, weight: Tensor, weight_sums: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float
) -> Tensor:
    rounded, row_scales = _rounded(x, x_scale)
    y = torch.mm(rounded.float(), weight.float().t()).mul_(row_scales * scales)
    return y if bias is None else y.add_(bias)


_WAYS: dict[str, Callable[..., Tensor]] = {"cpp": _by_cpp, "int_mm": _by_int_mm, "float": _by_float}


def _rounded(x: Tensor, x_scale: float) -> tuple[Tensor, Tensor]:
    """int8 values [rows, I] and the size of their steps [rows, 1]; in one pass where the kernel is there."""
    if x.device.type == "cpu" and "cpp" in int8_backends("cpu"):
        rounded, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), 1)
        workers = max(1, min(torch.get_num_threads(), x.numel() // _WEIGHTS_PER_WORKER))
        _kernel("int8_round")(x.data_ptr(), rounded.data_ptr(), scale.data_ptr(), *x.shape, workers, x_scale)
        return rounded, scale
    largest = x.abs().amax(dim=1, keepdim=True)  # NaN where a row holds one, which must reach the outputs
    scale = torch.where(largest == 0, 1.0, largest / 127)
    if x_scale > 0:
        scale = torch.where(largest.isnan(), largest, x_scale)
    return (x * (1 / scale)).round_().clamp_(-127, 127).to(torch.int8), scale


def _enough_rows(rounded: Tensor) -> Tensor:
    """CUDA's int8 product takes 17 rows or more."""
    missing = 17 - len(rounded) if rounded.device.type == "cuda" else 0
    return rounded if missing <= 0 else torch.nn.functional.pad(rounded, (0, 0, 0, missing))


@cache
def _kernel(name: str) -> Any:
    function = getattr(load(_SOURCE, extra_flags=("-fopenmp",)), name)
    num_pointers, num_sizes = {"int8_product": (6, 4), "int8_round": (3, 3)}[name]
    function.argtypes = [ctypes.c_void_p] * num_pointers + [ctypes.c_int64] * num_sizes + [ctypes.c_double]
    function.restype = None
    return function


# A PyTorch operator, so that meters count it and compilers leave it whole, whatever answers. Calling it takes longer
# than a small product does, so where nobody watches, `int8_product` calls what is behind it.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define(
    "int8_product(Tensor x, Tensor weight, Tensor weight_sums, Tensor scales, Tensor? bias, float x_scale, str backend)"
    " -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("int8_product", _product, _key)
_OPERATOR = torch.ops.transformer_problems.int8_product.default
torch.library.register_fake(
    "transformer_problems::int8_product",
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
    lib=_LIBRARY,
)


@register_flop_formula(torch.ops.transformer_problems.int8_product)
def _flops(x: Any, weight: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    flops: int = 2 * x[0] * weight[0] * weight[1]
    return flops
