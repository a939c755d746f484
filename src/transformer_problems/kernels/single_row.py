"""Operators on the single row of a decoding step in bfloat16 on a CPU, in C++: a matrix product and a norm.

PyTorch's own read a matrix at two thirds of the memory's speed or less, and take a norm apart into many operations.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.kernels.compiler import has_kernel, load

_SOURCE = Path(__file__).with_suffix(".cpp")
_WEIGHTS_PER_WORKER = 2**16  # some microseconds of reading, more than another thread costs


@cache
def row_backend() -> Literal["cpp", "torch"]:
    """What answers a bfloat16 row on this machine's CPU: our kernels, or PyTorch's where they cannot be built.

    The first call builds the kernels, or warns once with the reason.
    """
    built = has_kernel("decoding in bfloat16", lambda: load(_SOURCE, extra_flags=("-fopenmp",)))
    return "cpp" if built else "torch"


def takes_row(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels answer for x and a weight whose last dimension is x's.

    They do for one row in bfloat16 on a CPU, where no gradient is asked for; a compiled graph has ways of its own.
    """
    if not is_row(x, weight) or torch.compiler.is_compiling() or not weight.is_contiguous():
        return False
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not needs_gradient and row_backend() == "cpp"


def is_row(x: Tensor, weight: Tensor) -> bool:
    """Whether x is one row in bfloat16 on a CPU, as the weight is, whose last dimension is x's."""
    return (
        x.dtype is weight.dtype is torch.bfloat16
        and x.dim() > 0
        and x.numel() == x.shape[-1] == weight.shape[-1]
        and x.device.type == weight.device.type == "cpu"
    )


def row_product(weight: Tensor, x: Tensor) -> Tensor:
    """weight x, summed in float32 and rounded once. weight: [O, I]; x: [..., I], one row; output: [..., O]."""
    y: Tensor = _ROW_PRODUCT(weight, x)
    return y


def row_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once. x: [..., C], one row; weight: [C]; output as x."""
    y: Tensor = _ROW_RMS_NORM(x, weight, eps)
    return y


def _row_product(weight: Tensor, x: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    row, y = x.contiguous(), x.new_empty((*x.shape[:-1], outputs))
    workers = max(1, min(torch.get_num_threads(), outputs * inputs // _WEIGHTS_PER_WORKER))
    _product()(weight.data_ptr(), row.data_ptr(), y.data_ptr(), outputs, inputs, workers)
    return y


def _row_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    row = x.contiguous()
    y = torch.empty_like(row)
    _norm()(row.data_ptr(), weight.data_ptr(), y.data_ptr(), row.numel(), eps)
    return y


@cache
def _product() -> Any:
    return _function("row_product_bfloat16", [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3)


@cache
def _norm() -> Any:
    return _function("rms_norm_bfloat16", [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_double])


def _function(name: str, argument_types: list[Any]) -> Any:
    function = getattr(load(_SOURCE, extra_flags=("-fopenmp",)), name)
    function.argtypes, function.restype = argument_types, None
    return function


# PyTorch operators, so that meters count them.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define("row_product(Tensor weight, Tensor x) -> Tensor")
_LIBRARY.define("row_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_LIBRARY.impl("row_product", _row_product, "CPU")
_LIBRARY.impl("row_rms_norm", _row_rms_norm, "CPU")
_ROW_PRODUCT = torch.ops.transformer_problems.row_product.default
_ROW_RMS_NORM = torch.ops.transformer_problems.row_rms_norm.default


@register_flop_formula(torch.ops.transformer_problems.row_product)
def _row_product_flops(weight: Any, x: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    flops: int = 2 * weight[0] * weight[1]
    return flops
