"""The selective scan in C++ for CPU tensors: raw calls, without autograd."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from transformer_problems.kernels.compiler import load

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_UPDATES_PER_WORKER = 2**18  # state updates, a tenth of a millisecond or so: several times a thread's own cost
_LANES = {torch.float32: 16, torch.float64: 8}  # channels in a 64-byte vector, the smallest share of a worker


def build_selective_scan() -> ctypes.CDLL:
    """The compiled kernels; compiles them if this machine never did, which takes some seconds.

    Raises:
        MissingDependencyError: If there is no compiler.
        KernelBuildError: If the compiler fails.
    """
    return load(_SOURCE)


def selective_scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, *, chunk_len: int
) -> tuple[Tensor, Tensor]:
    """Outputs, and the states before each chunk of tokens and after the last one.

    All tensors are contiguous, on the CPU and of one dtype, float32 or float64.

    Shape:
        u, delta: [B, N, C]; A: [S, C]; B, C: [B, N, S]; initial_state: [B, S, C].
        outputs: [B, N, C]; states: [ceil(N / chunk_len) + 1, B, S, C].
    """
    y = torch.empty_like(u)
    states = u.new_empty(-(-u.shape[1] // chunk_len) + 1, *initial_state.shape)
    states[0] = initial_state
    _call("forward", [u, delta, A, B, C, y, states], _sizes(u, A, chunk_len))
    return y, states


def selective_scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    chunk_len: int,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and the initial state, shaped as they are.

    Args:
        grad_state: Gradient of the last state, [B, S, C].
        states: What the forward call returned.
    """
    sizes = _sizes(u, A, chunk_len)
    carry = grad_state.clone(memory_format=torch.contiguous_format)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_A = A.new_zeros(len(u), *A.shape)
    grad_B, grad_C = B.new_zeros(sizes[-1], *B.shape), C.new_zeros(sizes[-1], *C.shape)
    tensors = [grad_y, u, delta, A, B, C, states, carry, grad_u, grad_delta, grad_A, grad_B, grad_C]
    _call("backward", tensors, sizes)
    return grad_u, grad_delta, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), carry


def _sizes(u: Tensor, A: Tensor, chunk_len: int) -> tuple[int, ...]:
    """batch, tokens, channels, states, chunk, workers: the struct `Sizes` of the C++ file."""
    batch_size, num_tokens, width = u.shape
    shares = min(-(-width // _LANES[u.dtype]), u.numel() * len(A) // _UPDATES_PER_WORKER)
    workers = max(1, min(torch.get_num_threads(), shares))
    return batch_size, num_tokens, width, len(A), chunk_len, workers


def _call(name: str, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
    dtype = tensors[0].dtype
    assert all(t.is_contiguous() and t.dtype == dtype and t.device.type == "cpu" for t in tensors)
    function = getattr(build_selective_scan(), f"selective_scan_{name}_{_DTYPES[dtype]}")
    function.restype = None
    function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), (ctypes.c_int64 * len(sizes))(*sizes))
