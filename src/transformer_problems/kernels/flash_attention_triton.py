"""FlashAttention by this package's own Triton kernels, forward and backward, as a PyTorch operator."""

import contextlib
import importlib
import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.core.arguments import require_flag, require_multiple
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError, KernelBuildError
from transformer_problems.core.inputs import check_floating, shown

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 128


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v tile by tile, in one kernel forward and two backward, on a GPU that Triton knows.

    Products and sums are in float32; weights and the gradients of scores are rounded to the input's dtype between two
    products, as the paper's kernels do. Memory beyond inputs and output is one float32 a query and head, and one more
    in the backward pass, which is not differentiable again. Gradients of grouped keys are summed over their heads
    inside a kernel, so a call gives the same bits each time. Without queries the output is empty, without keys zero,
    and no kernel runs.

    Head dimensions that are no power of two are computed as the next one, at its cost.

    Where the environment has TRITON_INTERPRET=1 before Triton is imported, tensors on a CPU are answered too, by
    Triton's interpreter: for tests, thousands of times slower.

    Args:
        key_mask: True may be attended to. A query without a key gives zeros.
        is_causal: The queries are the last N of the M tokens, and each sees itself and what came before.

    Shape:
        q: [B, H, N, D]; k, v: [B, G, M, D] with H a multiple of G and D up to 128; key_mask: [B, M] bool; output as q.

    Raises:
        ArgumentError: If the tensors do not fit each other or the kernels (see `triton_refusal`), or a gradient is to
            be differentiated again.
        MissingDependencyError: If Triton is not installed.
        KernelBuildError: If the GPU has too little memory of its own for a tile.

    Source:
        Dao et al. 2022, arXiv:2205.14135, algorithms 1, 2 and 4; Dao 2023, arXiv:2307.08691, section 3.1. Differs from
        the papers: no dropout; the gradient of queries has a kernel of its own instead of atomic additions.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)  # doctest: +SKIP
        >>> flash_attention_triton(q, k, v, is_causal=True).shape  # doctest: +SKIP
        torch.Size([1, 8, 4096, 64])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
    require_flag(is_causal=is_causal)
    reason = triton_refusal(q, k, v)
    if reason is not None:
        raise ArgumentError(reason)
    _check_key_mask(key_mask, k)
    require("triton", extra="gpu")
    out: Tensor = _FORWARD(q, k, v, key_mask, is_causal)[0]
    return out


def triton_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the rule and the remedy; None where they can."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        return (
            f"q, k and v must be float16, bfloat16 or float32, all the same, for Triton; got {q.dtype}, {k.dtype} and "
            f"{v.dtype}. Convert them, or use backend='sdpa'."
        )
    if q.dim() != 4 or q.shape[::3] != k.shape[::3] or k.shape != v.shape:
        return (
            "q must be [B, H, N, D], k and v [B, G, M, D] for Triton; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}. Reshape them, or use backend='sdpa'."
        )
    if not 1 <= q.shape[-1] <= _LARGEST_HEAD_DIM:
        return (
            f"head_dim must be from 1 to {_LARGEST_HEAD_DIM} for Triton; got {q.shape[-1]}. "
            "Use more heads, or backend='sdpa'."
        )
    if not (q.device == k.device == v.device and (q.device.type == "cuda" or _is_interpreted())):
        return (
            f"q, k and v must be on one CUDA device for Triton; got {q.device}, {k.device} and {v.device}. "
            "Move them, or use backend='sdpa'."
        )
    require_multiple("num_heads", q.shape[1], "num_kv_heads", k.shape[1])
    return None


@cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return find_spec("triton") is not None


def _is_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return has_triton() and bool(_kernels("forward").INTERPRETED.value)


def _kernels(direction: str) -> Any:
    return importlib.import_module(f"transformer_problems.kernels.flash_attention_{direction}")


def _check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    is_mask = isinstance(key_mask, Tensor) and key_mask.dtype == torch.bool
    if not is_mask or key_mask.shape != expected or key_mask.device != k.device:
        where = f" on {key_mask.device}" if isinstance(key_mask, Tensor) else ""
        raise ArgumentError(
            f"key_mask must be bool, True may attend, {list(expected)} on {k.device}; got {shown(key_mask)}{where}. "
            "Convert it."
        )


class _Tile(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps of a program, loads in flight."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def _tile(kernel: str, x: Tensor) -> _Tile:
    """Tiles that fit 96 KB of shared memory, which every GPU since 2020 has."""
    wide = x.shape[-1] > 64
    if x.dtype == torch.float32:
        return _Tile(32, 32, 8, 1) if wide else _Tile(32, 32, 4, 2)
    if kernel == "forward":
        return _Tile(128, 64, 8, 2) if wide else _Tile(128, 64, 4, 2)
    return _Tile(64, 64, 8, 1) if wide else _Tile(64, 64, 4, 2)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool, tile: _Tile
) -> dict[str, Any]:
    """What all three kernels are told of their inputs; scores in base 2 take log2(e) into the scale."""
    _, num_heads, num_queries, head_dim = q.shape
    strides = {
        f"{name}_{part}": stride
        for name, x in (("q", q), ("k", k), ("v", v))
        for part, stride in zip(("batch", "head", "stride"), x.stride(), strict=False)
    }
    mask_batch, mask_stride = (0, 0) if key_mask is None else key_mask.stride()
    return {
        **strides,
        "mask_batch": mask_batch,
        "mask_stride": mask_stride,
        "num_heads": num_heads,
        "group_size": num_heads // k.shape[1],
        "num_queries": num_queries,
        "num_keys": k.shape[2],
        "scale": head_dim**-0.5 * math.log2(math.e),
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, 1 << (head_dim - 1).bit_length()),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "IS_CAUSAL": is_causal,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors' own."""
    resources = require("triton", extra="gpu").runtime.OutOfResources
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except resources as error:
        raise KernelBuildError(f"{device} is too small for the kernel: {error}. Use backend='sdpa'.") from error


def _packed_tokens(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels take any strides but for the last dimension's, which is 1."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row in base 2."""
    out, log_sums = _fake_forward(q, k, v, key_mask, is_causal)
    if not q.numel() or not k.numel():
        return out.zero_(), log_sums.fill_(math.inf)
    q, k, v = _packed_tokens(q, k, v)
    tile = _tile("forward", q)
    programs = math.ceil(q.shape[2] / tile.rows) * q.shape[0] * q.shape[1]
    with _on(q.device):
        _kernels("forward").forward_kernel[(programs,)](
            q, k, v, key_mask, out, log_sums, **_arguments(q, k, v, key_mask, is_causal, tile)
        )
    return out, log_sums


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, key_mask, out, log_sums, is_causal)
    if not q.numel() or not k.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    q, k, v = _packed_tokens(q, k, v)
    grad = grad.contiguous()
    tile, mean_grads = _tile("backward", q), torch.empty_like(log_sums)
    arguments = _arguments(q, k, v, key_mask, is_causal, tile) | {"softmax_scale": q.shape[-1] ** -0.5}
    row_programs = math.ceil(q.shape[2] / tile.rows) * q.shape[0] * q.shape[1]
    column_programs = math.ceil(k.shape[2] / tile.columns) * k.shape[0] * k.shape[1]
    kernels = _kernels("backward")
    with _on(q.device):
        kernels.grad_q_kernel[(row_programs,)](q, k, v, key_mask, out, log_sums, grad, mean_grads, grad_q, **arguments)
        kernels.grad_kv_kernel[(column_programs,)](
            q, k, v, key_mask, log_sums, grad, mean_grads, grad_k, grad_v, **arguments
        )
    return grads


# PyTorch operators, so that meters count them and torch.compile leaves them whole.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define(
    "flash_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? key_mask, bool is_causal) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "flash_attention_triton_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, "
    "Tensor log_sums, bool is_causal) -> (Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):  # the CPU for Triton's interpreter
    _LIBRARY.impl("flash_attention_triton", _forward, _key)
    _LIBRARY.impl("flash_attention_triton_backward", _backward, _key)
_FORWARD = torch.ops.transformer_problems.flash_attention_triton.default
_BACKWARD = torch.ops.transformer_problems.flash_attention_triton_backward.default


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.is_causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _gradients(ctx: Any, grad: Tensor, grad_log_sums: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ArgumentError(
            "create_graph must be False through Triton's kernels, whose gradients cannot be differentiated again; got "
            "True. Use DenseAttention."
        )
    q, k, v, key_mask, out, log_sums = ctx.saved_tensors
    return *_BACKWARD(grad, q, k, v, key_mask, out, log_sums, ctx.is_causal), None, None


torch.library.register_fake("transformer_problems::flash_attention_triton", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("transformer_problems::flash_attention_triton_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "transformer_problems::flash_attention_triton", _gradients, setup_context=_keep, lib=_LIBRARY
)


@register_flop_formula(torch.ops.transformer_problems.flash_attention_triton)
def _forward_flops(q: Any, k: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    return _products(q, k, 2)


@register_flop_formula(torch.ops.transformer_problems.flash_attention_triton_backward)
def _backward_flops(grad: Any, q: Any, k: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Three products for the gradient of the queries and four for those of keys and values."""
    return _products(q, k, 7)


def _products(q: Any, k: Any, count: int) -> int:
    """FLOPs of so many products over all N x M pairs, the whole rectangle also where causal, as PyTorch counts."""
    return int(2 * count * math.prod(q) * k[-2])
