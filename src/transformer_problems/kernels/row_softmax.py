"""Softmax of scaled, causally limited scores in one pass over them: CUDA C++ and its twin in C++ for the CPU."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_finite, require_flag, require_positive
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.inputs import check_floating, shown
from transformer_problems.kernels.compiler import has_kernel, load
from transformer_problems.kernels.cuda_compiler import load_cuda

SoftmaxBackend = Literal["cuda", "cpp", "torch"]
"""Our CUDA kernel or its C++ twin, for float32 and float64 on their device; PyTorch's operators for everything else."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_CUDA_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_DEVICES: dict[SoftmaxBackend, str] = {"cuda": "cuda", "cpp": "cpu"}
_VALUES_PER_WORKER = 2**14  # some tens of microseconds, more than another thread costs


def row_softmax(
    scores: Tensor, *, scale: float = 1.0, is_causal: bool = False, backend: SoftmaxBackend | Literal["auto"] = "auto"
) -> Tensor:
    """softmax(scale * scores) over the last dimension; `is_causal` leaves out what lies above the diagonal.

    The kernels take the scaling, the mask and the softmax in one operator, and read nothing that is masked. A row of
    which nothing may be attended to, or all is -inf, gives zeros. Differentiable any number of times, beyond the first
    by PyTorch's operators.

    Args:
        scale: Factor on the scores.
        is_causal: The N rows are the last of the M tokens, and row i sees columns up to i + M - N.
        backend: "auto" is what `softmax_backend` says.

    Shape:
        scores: [..., N, M]; output as scores.

    Raises:
        ArgumentError: If scores are no float matrices, the scale is not positive, `is_causal` is no bool, or the back
            end cannot answer.
        UnknownNameError: If there is no such back end.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, equation 1; the CUDA kernel's blocks, threads and shared memory: Nickolls
        et al. 2008, doi:10.1145/1365490.1365500.
    """
    require_positive(scale=scale)
    require_finite(scale=scale)
    require_flag(is_causal=is_causal)
    check_floating("scores", scores)
    if scores.dim() < 2:
        raise ArgumentError(
            f"scores must be a float tensor [..., N, M]; got {shown(scores)}. Give one row as scores[None]."
        )
    answers = _answers(backend, scores)
    if answers == "torch":
        return _plain(scores, scale, is_causal)
    weights: Tensor = _FORWARD(scores, scale, is_causal, answers)
    return weights


def softmax_backend(scores: Tensor) -> SoftmaxBackend:
    """What answers for scores where the back end is "auto"; compiled graphs fuse in ways of their own."""
    for name, device in _DEVICES.items():
        if scores.device.type == device and scores.dtype in _DTYPES and not torch.compiler.is_compiling():
            return name if _is_built(scores.device) else "torch"
    return "torch"


@cache
def _is_built(device: torch.device) -> bool:
    """Whether this machine has the kernels of a device; the first call builds them, or warns once with the reason."""
    return has_kernel("row_softmax", lambda: _library(device))


def _library(device: torch.device) -> ctypes.CDLL:
    if device.type == "cuda":
        return load_cuda(_CUDA_SOURCE, torch.cuda.current_device() if device.index is None else device.index)
    return load(_SOURCE, extra_flags=("-fopenmp",))


def _answers(backend: str, scores: Tensor) -> str:
    known = ("auto", *get_args(SoftmaxBackend))
    if backend not in known:
        raise UnknownNameError("back end of row_softmax", backend, known)
    if backend in _DEVICES and not (scores.device.type == _DEVICES[backend] and scores.dtype in _DTYPES):
        raise ArgumentError(
            f"backend {backend!r} takes float32 and float64 on {_DEVICES[backend]}; got {scores.dtype} on "
            f"{scores.device}. Use 'torch' or 'auto'."
        )
    return softmax_backend(scores) if backend == "auto" else backend


def _plain(scores: Tensor, scale: float, is_causal: bool) -> Tensor:
    never = float("-inf")
    scaled = scale * (scores if scores.dtype == torch.float64 else scores.float())
    if is_causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(columns - rows + 1)
        scaled = scaled.masked_fill(hidden, never)
    empty = (scaled == never).all(-1, keepdim=True)
    return scaled.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(scores.dtype)


def _forward(scores: Tensor, scale: float, is_causal: bool, backend: str) -> Tensor:
    weights = _fake(scores, scale, is_causal, backend)
    _run("forward", [scores.contiguous(), weights], scale, is_causal)
    return weights


def _backward(grad: Tensor, weights: Tensor, scale: float, is_causal: bool, backend: str) -> Tensor:
    grad_scores = torch.empty_like(weights)
    _run("backward", [grad.contiguous(), weights, grad_scores], scale, is_causal)
    return grad_scores


def _run(name: str, tensors: list[Tensor], scale: float, is_causal: bool) -> None:
    x = tensors[0]
    if not x.numel():
        return
    *_, rows, width = x.shape
    where: int
    if x.device.type == "cuda":
        where = torch.cuda.current_stream(x.device).cuda_stream
    else:
        where = max(1, min(torch.get_num_threads(), x.numel() // _VALUES_PER_WORKER))
    function = _kernel(f"row_softmax_{name}_{_DTYPES[x.dtype]}", len(tensors), x.device)
    addresses = (t.data_ptr() for t in tensors)
    failed = function(*addresses, x.numel() // (rows * width), rows, width, is_causal, scale, where)
    if failed:
        raise RuntimeError(f"CUDA error {failed} at the launch of row_softmax")


@cache
def _kernel(name: str, num_tensors: int, device: torch.device) -> Any:
    function = getattr(_library(device), name)
    sizes, last = [ctypes.c_int64] * 4, ctypes.c_void_p if device.type == "cuda" else ctypes.c_int64
    function.argtypes = [ctypes.c_void_p] * num_tensors + [*sizes, ctypes.c_double, last]
    function.restype = ctypes.c_int if device.type == "cuda" else None
    return function


def _fake(scores: Tensor, scale: float, is_causal: bool, backend: str) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.is_causal, ctx.backend = inputs
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weights,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: this can be derived once more
        grad_scores = ctx.scale * weights * (grad - (grad * weights).sum(-1, keepdim=True))
    else:
        grad_scores = _BACKWARD(grad, weights, ctx.scale, ctx.is_causal, ctx.backend)
    return grad_scores, None, None, None


# PyTorch operators, so that meters count them and torch.compile leaves them whole.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define("row_softmax(Tensor scores, float scale, bool is_causal, str backend) -> Tensor")
_LIBRARY.define("row_softmax_backward(Tensor grad, Tensor weights, float scale, bool is_causal, str backend) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("row_softmax", _forward, _key)
    _LIBRARY.impl("row_softmax_backward", _backward, _key)
_FORWARD = torch.ops.transformer_problems.row_softmax.default
_BACKWARD = torch.ops.transformer_problems.row_softmax_backward.default
torch.library.register_fake("transformer_problems::row_softmax", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "transformer_problems::row_softmax_backward", lambda grad, weights, *rest: torch.empty_like(weights), lib=_LIBRARY
)
torch.library.register_autograd("transformer_problems::row_softmax", _gradients, setup_context=_keep, lib=_LIBRARY)
