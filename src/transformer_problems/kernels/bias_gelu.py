"""A bias and a GELU in one pass over memory, forward and backward: a fused operator of this package's own."""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.inputs import check_floating, shown
from transformer_problems.kernels.compiler import has_kernel, load

GeluBackend = Literal["cpp", "torch"]
"""Our C++ kernel, for float32 and float64 on a CPU; or PyTorch's operators, for everything else."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_VALUES_PER_WORKER = 2**15  # some tens of microseconds, more than another thread costs


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, inplace: bool = False, backend: GeluBackend | Literal["auto"] = "auto"
) -> Tensor:
    """gelu(x + bias), with the exact GELU, z Phi(z).

    The kernel reads x once and writes the output once; the backward pass reads x and the output's gradient once and
    gives the gradients of x and of the bias, where PyTorch takes three operators (the sum, the GELU, and backward the
    GELU's gradient and a sum over rows). Small outputs are exact to the last bits, which 1 + erf loses.

    Differentiable twice, the second time by PyTorch's operators. It is a PyTorch operator, which torch.compile takes as
    it is.

    Args:
        inplace: The output takes x's memory; x must not be needed for a gradient.
        backend: "auto" is what `gelu_backend` says.

    Shape:
        x: [..., F]; bias: [F], of x's dtype and device; output as x.

    Raises:
        ArgumentError: If x is no float tensor, the bias does not fit it, `inplace` meets a gradient or x with gaps, or
            "cpp" cannot answer.
        UnknownNameError: If there is no such back end.

    Source:
        Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2; the tail of the normal distribution by Shepherd and
        Laframboise 1981, doi:10.1090/S0025-5718-1981-0595058-X.
    """
    _check(x, bias)
    _check_backend(backend, x)
    if not inplace:
        y: Tensor = _FORWARD(x, bias, backend)
        return y
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ArgumentError("inplace must be False where a gradient is asked for, which needs x. Pass inplace=False.")
    if not x.is_contiguous():
        raise ArgumentError(f"x must be contiguous to be overwritten; got strides {x.stride()}. Pass inplace=False.")
    _INPLACE(x, bias, backend)
    torch.autograd.graph.increment_version(x)  # or a graph that saved x would not see that it changed
    return x


def gelu_backend(x: Tensor) -> GeluBackend:
    """What answers for x where the back end is "auto"."""
    return "cpp" if x.device.type == "cpu" and x.dtype in _DTYPES and _is_built() else "torch"


@cache
def _is_built() -> bool:
    """Whether this machine has the kernels; the first call builds them, or warns once with the reason."""
    return has_kernel("bias_gelu", lambda: load(_SOURCE, extra_flags=("-fopenmp",)))


def _check(x: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    if not x.dim():
        raise ArgumentError(f"x must be a float tensor [..., F]; got {shown(x)}. Give one number as x[None].")
    if bias is None:
        return
    check_floating("bias", bias)
    if bias.shape != x.shape[-1:] or bias.dtype != x.dtype or bias.device != x.device:
        raise ArgumentError(
            f"bias must be [{x.shape[-1]}], {x.dtype} on {x.device}, as x; got {list(bias.shape)}, {bias.dtype} on "
            f"{bias.device}. Convert one of them."
        )


def _check_backend(backend: str, x: Tensor) -> None:
    known = ("auto", *get_args(GeluBackend))
    if backend not in known:
        raise UnknownNameError("back end of bias_gelu", backend, known)
    if backend == "cpp" and not (x.device.type == "cpu" and x.dtype in _DTYPES):
        raise ArgumentError(
            f"backend 'cpp' takes float32 and float64 on a CPU; got {x.dtype} on {x.device}. Use 'torch' or 'auto'."
        )


def _forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    x = x.contiguous()
    if _answers(backend, x) == "torch":
        return torch.nn.functional.gelu(x if bias is None else x + bias)
    y = torch.empty_like(x)
    _run("forward", x, bias, [x, bias, y])
    return y


def _inplace(x: Tensor, bias: Tensor | None, backend: str) -> None:
    if _answers(backend, x) == "torch":
        torch.ops.aten.gelu_(x if bias is None else x.add_(bias))
    else:
        _run("forward", x, bias, [x, bias, x])


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias, which is empty where there is none."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_bias = x.new_empty(0 if bias is None else x.shape[-1])
    if _answers(backend, x) == "torch":
        grad_x = torch.ops.aten.gelu_backward(grad, x if bias is None else x + bias)
        return grad_x, grad_bias if bias is None else grad_x.reshape(-1, x.shape[-1]).sum(0)
    grad_x = torch.empty_like(x)
    _run("backward", x, bias, [grad, x, bias, grad_x, grad_bias])
    return grad_x, grad_bias


def _answers(backend: str, x: Tensor) -> str:
    """Chosen inside the operator, where torch.compile does not look."""
    return gelu_backend(x) if backend == "auto" else backend


def _run(name: str, x: Tensor, bias: Tensor | None, tensors: list[Tensor | None]) -> None:
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    workers = max(1, min(torch.get_num_threads(), rows, x.numel() // _VALUES_PER_WORKER))
    kept = [t if t is None else t.contiguous() for t in tensors]  # holds a copy of a strided bias during the call
    function = _kernel(f"bias_gelu_{name}_{_DTYPES[x.dtype]}", len(tensors))
    function(*(None if t is None else t.data_ptr() for t in kept), rows, width, workers)


@cache
def _kernel(name: str, num_tensors: int) -> Any:
    function = getattr(load(_SOURCE, extra_flags=("-fopenmp",)), name)
    function.argtypes = [ctypes.c_void_p] * num_tensors + [ctypes.c_int64] * 3
    function.restype = None
    return function


# PyTorch operators, so that meters count them and torch.compile leaves them whole.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define("bias_gelu(Tensor x, Tensor? bias, str backend) -> Tensor")
_LIBRARY.define("bias_gelu_(Tensor(a!) x, Tensor? bias, str backend) -> ()")
_LIBRARY.define("bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str backend) -> (Tensor, Tensor)")
for _name, _function in (("bias_gelu", _forward), ("bias_gelu_", _inplace), ("bias_gelu_backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # any device
_FORWARD = torch.ops.transformer_problems.bias_gelu.default
_INPLACE = torch.ops.transformer_problems.bias_gelu_.default
_BACKWARD = torch.ops.transformer_problems.bias_gelu_backward.default


def _fake_forward(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, bias, backend), x.new_empty(0 if bias is None else x.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: these can be derived once more
        z = x if bias is None else x + bias
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        grad_x = grad * (torch.special.ndtr(z) + z * density)
        return grad_x, None if bias is None else grad_x.reshape(-1, x.shape[-1]).sum(0), None
    grad_x, grad_bias = _BACKWARD(grad, x, bias, ctx.backend)
    return grad_x, None if bias is None else grad_bias, None


torch.library.register_fake("transformer_problems::bias_gelu", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("transformer_problems::bias_gelu_", lambda x, bias, backend: None, lib=_LIBRARY)
torch.library.register_fake("transformer_problems::bias_gelu_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("transformer_problems::bias_gelu", _gradients, setup_context=_keep, lib=_LIBRARY)
