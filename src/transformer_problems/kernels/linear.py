"""Linear layers that read their weights faster where they multiply a single row, as every step of decoding does."""

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.core.errors import KernelBuildError, MissingDependencyError
from transformer_problems.kernels.compiler import load

_SOURCE = Path(__file__).with_name("row_product.cpp")
_WEIGHTS_PER_WORKER = 2**16  # some microseconds of reading, more than another thread costs


class Linear(nn.Linear):
    """torch.nn.Linear, answered by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as torch.nn.functional.linear gives it up to rounding.

    A single row in bfloat16 on a CPU becomes a matrix-vector product, which is limited by how fast the weights are
    read: by this package's kernel where no gradient is asked for and it can be built, else by torch.mv. PyTorch's own
    way, a matrix-matrix product, reads them at two thirds of the speed on some processors. `row_backend` tells which
    one runs.

    Shape:
        x: [..., I]; weight: [O, I]; bias: [O]; output: [..., O].
    """
    is_row = x.numel() == weight.shape[1] and x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    if not is_row:
        return nn.functional.linear(x, weight, bias)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    compiles = torch.compiler.is_compiling()  # a compiled graph has ways of its own
    if needs_gradient or compiles or not weight.is_contiguous() or row_backend() == "mv":
        y = torch.mv(weight, x.reshape(-1))
    else:
        y = torch.ops.transformer_problems.row_product(weight, x.reshape(-1))
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@cache
def row_backend() -> Literal["cpp", "mv"]:
    """What multiplies a bfloat16 row on this machine's CPU: our kernel, or torch.mv where it cannot be built.

    The first call builds the kernel, or warns once with the reason.
    """
    try:
        load(_SOURCE, extra_flags=("-fopenmp",))
    except (KernelBuildError, MissingDependencyError) as error:
        warnings.warn(f"decoding in bfloat16 uses its slower PyTorch path: {error}", stacklevel=3)
        return "mv"
    return "cpp"


def _row_product(weight: Tensor, x: Tensor) -> Tensor:
    y = torch.empty(len(weight), dtype=weight.dtype)
    workers = max(1, min(torch.get_num_threads(), weight.numel() // _WEIGHTS_PER_WORKER))
    row = x.contiguous()
    _kernel()(weight.data_ptr(), row.data_ptr(), y.data_ptr(), *weight.shape, workers)
    return y


@cache
def _kernel() -> Any:
    function = load(_SOURCE, extra_flags=("-fopenmp",)).row_product_bfloat16
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    function.restype = None
    return function


# A PyTorch operator, so that meters count it.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define("row_product(Tensor weight, Tensor x) -> Tensor")
_LIBRARY.impl("row_product", _row_product, "CPU")


@register_flop_formula(torch.ops.transformer_problems.row_product)
def _row_product_flops(weight: Any, x: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    return 2 * weight[0] * weight[1]  # type: ignore[no-any-return]
