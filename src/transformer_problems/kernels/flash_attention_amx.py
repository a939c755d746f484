"""Attention in bfloat16 by the matrix instructions (AMX) of x86 processors, in C++, as a PyTorch operator."""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.core.arguments import require_flag, require_multiple
from transformer_problems.core.errors import ArgumentError, DeviceError, KernelBuildError
from transformer_problems.core.inputs import check_floating, shown
from transformer_problems.kernels.compiler import has_kernel, load

LARGEST_HEAD_DIM = 256
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mamx-tile", "-mamx-bf16")
_CPU_INFO = Path("/proc/cpuinfo")
_NEEDED = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl"}
_SCORES_PER_WORKER = 2**14  # some tens of microseconds, more than another thread costs


def flash_attention_amx(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in bfloat16, with float32 scores, weights relative to the largest score so far.

    Weights are rounded to bfloat16 for the product with the values, and the output is rounded once. Memory beyond
    inputs and output is a copy of k and v in the order in which they are read, and some hundred kilobytes a thread.
    There is no backward pass. Threads do not change the result.

    Args:
        key_mask: True may be attended to. A query without a key gives zeros.
        is_causal: The queries are the last N of the M tokens, and each sees itself and what came before.

    Shape:
        q: [B, H, N, D]; k, v: [B, G, M, D] with H a multiple of G and D up to 256; key_mask: [B, M] bool; output as q,
        the heads of a token side by side in memory.

    Raises:
        ArgumentError: If the tensors do not fit each other or the kernel (see `amx_refusal`).
        DeviceError: If this machine's processor or system has no AMX.
        MissingDependencyError: If there is no C++ compiler.
        KernelBuildError: If the kernel cannot be built, or the system refuses this process the use of tiles.
        MemoryError: If there is no room for the copy of k and v.

    Source:
        Dao et al. 2022, arXiv:2205.14135, algorithm 1. Differs from the paper: queries are the outer loop (as in Dao
        2023, arXiv:2307.08691), forward only, no dropout, tiles of a CPU's.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 4096, 64).bfloat16()  # doctest: +SKIP
        >>> flash_attention_amx(q, k, v, is_causal=True).shape  # doctest: +SKIP
        torch.Size([1, 8, 4096, 64])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
    require_flag(is_causal=is_causal)
    reason = amx_refusal(q, k, v)
    if reason is not None:
        raise ArgumentError(reason)
    _check_key_mask(key_mask, k)
    out: Tensor = _FORWARD(q, k, v, key_mask, is_causal)
    return out


def amx_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot take these tensors, with the rule and the remedy; None where it can."""
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return (
            f"q, k and v must be bfloat16 for AMX; got {q.dtype}, {k.dtype} and {v.dtype}. "
            "Convert them, or use backend='sdpa'."
        )
    if not q.device.type == k.device.type == v.device.type == "cpu":
        return (
            f"q, k and v must be on the CPU for AMX; got {q.device}, {k.device} and {v.device}. "
            "Move them, or use backend='sdpa'."
        )
    if q.dim() != 4 or k.dim() != 4 or q.shape[::3] != k.shape[::3] or k.shape != v.shape:
        return (
            "q must be [B, H, N, D], k and v [B, G, M, D] for AMX; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}. Reshape them, or use backend='sdpa'."
        )
    if not 1 <= q.shape[-1] <= LARGEST_HEAD_DIM:
        return (
            f"head_dim must be from 1 to {LARGEST_HEAD_DIM} for AMX; got {q.shape[-1]}. "
            "Use more heads, or backend='sdpa'."
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return (
            "q, k and v must need no gradient for AMX, which has no backward pass; got one that does. "
            "Compute under torch.no_grad(), or use backend='sdpa'."
        )
    require_multiple("num_heads", q.shape[1], "num_kv_heads", k.shape[1])
    return None


@cache
def has_amx() -> bool:
    """Whether this machine has the kernel: asked first, it builds it, or warns once with the reason.

    A processor without AMX is no reason to warn, and nothing is built there.
    """
    return processor_has_amx() and has_kernel("attention in bfloat16", _library)


@cache
def processor_has_amx() -> bool:
    """Whether Linux lists the matrix instructions for bfloat16, and those of vectors that the kernel needs too."""
    if platform.machine() != "x86_64" or not _CPU_INFO.exists():
        return False
    with _CPU_INFO.open() as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= _NEEDED


def require_amx(name: str) -> None:
    """Refuse `name` on a machine without AMX.

    Raises:
        DeviceError: If the processor, or Linux on it, has none.
    """
    if not processor_has_amx():
        raise DeviceError(
            f"{name} needs an x86-64 processor whose flags in Linux's /proc/cpuinfo hold amx_tile and amx_bf16; this "
            "machine's do not. Use FlashAttention(backend='auto')."
        )


@cache
def _library() -> ctypes.CDLL:
    """The kernel, once the system lets this process use tiles."""
    require_amx("flash_attention_amx")
    library = load(_SOURCE, extra_flags=_FLAGS)
    library.flash_attention_bfloat16.restype = ctypes.c_int64
    library.permit_tiles.restype = ctypes.c_int64
    error = library.permit_tiles()
    if error:
        raise KernelBuildError(
            f"the system refuses this process the use of AMX tiles: {os.strerror(error)}. Linux 5.16 or later allows "
            "it, unless a thread has too small a stack for signals. Use FlashAttention(backend='sdpa')."
        )
    return library


def _check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    is_mask = isinstance(key_mask, Tensor) and key_mask.dtype == torch.bool and key_mask.device == k.device
    if not is_mask or key_mask.shape != expected:
        raise ArgumentError(
            f"key_mask must be bool, True may attend, {list(expected)} on the CPU; got {shown(key_mask)}. Convert it."
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
    out = _fake_forward(q)
    if not q.numel() or not k.numel():
        return out.zero_()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    seen = None if key_mask is None else key_mask.contiguous()
    batch_size, num_heads, num_queries, head_dim = q.shape
    num_groups, num_keys = k.shape[1:3]
    scores = batch_size * num_heads * num_queries * num_keys
    workers = max(1, min(torch.get_num_threads(), scores // _SCORES_PER_WORKER))
    lengths = (batch_size, num_heads, num_groups, num_queries, num_keys, head_dim, is_causal, workers)
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    addresses = (ctypes.c_void_p * 5)(*(None if t is None else t.data_ptr() for t in (q, k, v, seen, out)))
    if _library().flash_attention_bfloat16(addresses, (ctypes.c_int64 * 20)(*lengths, *strides)):
        raise MemoryError(f"there is no memory for a copy of k and v, {shown(k)} each. Take fewer keys at a time.")
    return out


def _fake_forward(q: Tensor, *rest: object) -> Tensor:
    batch_size, num_heads, num_queries, head_dim = q.shape
    return q.new_empty(batch_size, num_queries, num_heads, head_dim).transpose(1, 2)


# A PyTorch operator, so that meters count it.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define("flash_attention_amx(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool is_causal) -> Tensor")
_LIBRARY.impl("flash_attention_amx", _forward, "CPU")
_FORWARD = torch.ops.transformer_problems.flash_attention_amx.default
torch.library.register_fake("transformer_problems::flash_attention_amx", _fake_forward, lib=_LIBRARY)


@register_flop_formula(torch.ops.transformer_problems.flash_attention_amx)
def _flops(q: Any, k: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Both products; causal attention counts in whole, as SDPA does."""
    batch_size, num_heads, num_queries, head_dim = q
    flops: int = 4 * batch_size * num_heads * num_queries * k[2] * head_dim
    return flops
