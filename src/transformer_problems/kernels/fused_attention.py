"""Multi-head self-attention from x to its output as one operator of this package's own, forward and backward."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from transformer_problems.core.arguments import require_flag, require_positive_int
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.heads import check_input, merge_heads, split_heads
from transformer_problems.core.inputs import check_floating, makes_alike, shown
from transformer_problems.kernels.compiler import has_kernel, load

FusedBackend = Literal["cpp", "torch"]
"""Our C++ kernel, for float32 and float64 on a CPU; or PyTorch's operators one after another, for everything else."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_PRODUCTS_PER_WORKER = 2**20  # multiply-adds, some tens of microseconds: more than another thread costs


def fused_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    num_heads: int,
    is_causal: bool,
    key_mask: Tensor | None = None,
    backend: FusedBackend | Literal["auto"] = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head, with q, k, v = x qkv_weight^T + qkv_bias, through the output layer.

    The kernel is one operator, which meters count as such. Without gradients only x and the weights are read and the
    output is written; with them queries, keys, values, the heads' outputs and a log-sum-exp for each row of scores are
    kept, and the backward pass, one operator too, forms the scores again. A second derivative is taken of PyTorch's
    operators. A query that may attend to nothing gets zeros from every head.

    Args:
        backend: "auto" is what `fused_backend` says.

    Shape:
        x: [B, N, C]; qkv_weight: [3 C, C], queries, keys and values one above the other; qkv_bias: [3 C];
        out_weight: [C, C]; out_bias: [C]; key_mask: [B, N] bool, True for real tokens; output: [B, N, C].

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit, or "cpp" cannot answer.
        UnknownNameError: If there is no such back end.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; a call from input to output: Wang et al. 2020,
        arXiv:2010.13887. Differs from the paper: a kernel for CPUs, which multiplies by itself, where the paper calls
        a library for its products and fuses what lies between.
    """
    weights = {"qkv_weight": qkv_weight, "qkv_bias": qkv_bias, "out_weight": out_weight, "out_bias": out_bias}
    _check(x, weights, key_mask, num_heads, is_causal)
    if _answers(backend, x) == "torch":
        return _plain(x, qkv_weight, qkv_bias, out_weight, out_bias, key_mask, num_heads, is_causal)
    given = (x, *weights.values())
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y: Tensor = _FORWARD(*given, key_mask, num_heads, is_causal, keep)[0]
    return y


def fused_backend(x: Tensor) -> FusedBackend:
    """What answers for x where the back end is "auto".

    PyTorch's operators do for dtypes and devices that the kernel does not take, for no tokens, under autocast, and in
    compiled graphs, which fuse in ways of their own.
    """
    takes = _takes(x) and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return "cpp" if takes and x.numel() and _is_built() else "torch"


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _DTYPES


@cache
def _is_built() -> bool:
    """Whether this machine has the kernel; the first call builds it, or warns once with the reason."""
    return has_kernel("fused_attention", lambda: load(_SOURCE, extra_flags=("-fopenmp",)))


def _answers(backend: str, x: Tensor) -> str:
    known = ("auto", *get_args(FusedBackend))
    if backend not in known:
        raise UnknownNameError("back end of fused_attention", backend, known)
    if backend == "cpp" and not _takes(x):
        raise ArgumentError(
            f"backend 'cpp' takes float32 and float64 on a CPU; got {x.dtype} on {x.device}. Use 'torch' or 'auto'."
        )
    if backend == "cpp" and not x.numel():
        return "torch"  # of nothing either gives nothing
    return fused_backend(x) if backend == "auto" else backend


def _check(
    x: Tensor, weights: dict[str, Tensor | None], key_mask: Tensor | None, num_heads: int, is_causal: bool
) -> None:
    check_floating("x", x)
    width = x.shape[-1] if x.dim() else 0
    check_input(x, key_mask, embed_dim=width)
    require_positive_int(num_heads=num_heads)
    require_flag(is_causal=is_causal)
    if width % num_heads:
        raise ArgumentError(f"num_heads must divide the width of x; got {num_heads} and {width}.")
    shapes = {"qkv_weight": [3 * width, width], "qkv_bias": [3 * width], "out_weight": [width] * 2, "out_bias": [width]}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) and (weight is not None or name.endswith("weight")):
            raise ArgumentError(f"{name} must be a tensor {shapes[name]}; got {shown(weight)}. Pass a layer's weight.")
        if weight is not None and (list(weight.shape), weight.device) != (shapes[name], x.device):
            raise ArgumentError(
                f"{name} must be {shapes[name]} on {x.device}, as x; got {list(weight.shape)} on {weight.device}."
            )
        if weight is not None and weight.dtype != x.dtype and not makes_alike(x.device, x.dtype, weight.dtype):
            raise ArgumentError(f"{name} must be of x's dtype, {x.dtype}; got {weight.dtype}. Convert one of them.")


def _plain(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_mask: Tensor | None,
    num_heads: int,
    is_causal: bool,
) -> Tensor:
    q, k, v = (split_heads(part, num_heads) for part in linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1))
    if key_mask is None:
        heads = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    else:
        mask = key_mask[:, None, None, :]
        if is_causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        empty = ~mask.any(dim=-1, keepdim=True)
        heads = scaled_dot_product_attention(q, k, v, attn_mask=mask | empty).masked_fill(empty, 0.0)
    return linear(merge_heads(heads), out_weight, out_bias)


def _forward(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    key_mask: Tensor | None,
    num_heads: int,
    is_causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and for the backward pass q, k and v side by side, the heads' outputs, and log-sum-exps."""
    y, qkv, heads, log_sums = _fake_forward(
        x, qkv_weight, qkv_bias, out_weight, out_bias, key_mask, num_heads, is_causal, keep
    )
    kept = (qkv, heads, log_sums) if keep else (None, None, None)
    given = (x, qkv_weight, qkv_bias, out_weight, out_bias, key_mask)
    _run("forward", x, num_heads, is_causal, [*given, y, *kept])
    return y, qkv, heads, log_sums


def _backward(
    grad: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    key_mask: Tensor | None,
    qkv: Tensor,
    heads: Tensor,
    log_sums: Tensor,
    num_heads: int,
    is_causal: bool,
    has_qkv_bias: bool,
    has_out_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, the weights and the biases in the order of `fused_attention`; empty where there is no bias."""
    grads = _fake_backward(
        grad,
        x,
        qkv_weight,
        out_weight,
        key_mask,
        qkv,
        heads,
        log_sums,
        num_heads,
        is_causal,
        has_qkv_bias,
        has_out_bias,
    )
    grad_x, grad_qkv_weight, grad_qkv_bias, grad_out_weight, grad_out_bias = grads
    made = [
        torch.zeros_like(qkv),
        grad_x,
        grad_qkv_weight,
        grad_qkv_bias if has_qkv_bias else None,
        grad_out_weight,
        grad_out_bias if has_out_bias else None,
    ]
    given = [grad, x, qkv_weight, out_weight, key_mask, qkv, heads, log_sums]
    _run("backward", x, num_heads, is_causal, [*given, *made])
    return grads


def _run(name: str, x: Tensor, num_heads: int, is_causal: bool, tensors: list[Tensor | None]) -> None:
    batch_size, num_tokens, width = x.shape
    products = x.numel() * (4 * width + 2 * num_tokens)
    workers = max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_WORKER))
    kept = [None if t is None else t.contiguous() for t in tensors]  # holds copies of strided inputs during the call
    addresses = (ctypes.c_void_p * len(kept))(*(None if t is None else t.data_ptr() for t in kept))
    sizes = (ctypes.c_int64 * 6)(batch_size, num_tokens, width, num_heads, is_causal, workers)
    _kernel(f"fused_attention_{name}_{_DTYPES[x.dtype]}")(addresses, sizes)


@cache
def _kernel(name: str) -> Any:
    function = getattr(load(_SOURCE, extra_flags=("-fopenmp",)), name)
    function.restype = None
    return function


def _fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_heads, _, keep = args[-3:]
    batch_size, num_tokens, width = x.shape
    kept = ((batch_size, num_tokens, 3 * width), (batch_size, num_tokens, width), (batch_size, num_heads, num_tokens))
    qkv, heads, log_sums = (x.new_empty(shape if keep else (0,)) for shape in kept)
    return x.new_empty(x.shape), qkv, heads, log_sums


def _fake_backward(grad: Tensor, x: Tensor, qkv_weight: Tensor, out_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    has_qkv_bias, has_out_bias = args[-2:]
    width = x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(qkv_weight.shape),
        x.new_empty(3 * width if has_qkv_bias else 0),
        x.new_empty(out_weight.shape),
        x.new_empty(width if has_out_bias else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads, ctx.is_causal, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, qkv_weight, qkv_bias, out_weight, out_bias, key_mask, qkv, heads, log_sums = ctx.saved_tensors
    given = (x, qkv_weight, qkv_bias, out_weight, out_bias)
    rest = (None,) * 4  # of the mask and what is no tensor
    if grad is None:
        return (None,) * len(given) + rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: these can be derived once more
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused ones have no second derivative
            y = _plain(*given, key_mask, ctx.num_heads, ctx.is_causal)
        asked = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[: len(given)]) + rest
    has_biases = qkv_bias is not None, out_bias is not None
    grads = _BACKWARD(
        grad, x, qkv_weight, out_weight, key_mask, qkv, heads, log_sums, ctx.num_heads, ctx.is_causal, *has_biases
    )
    return tuple(None if t is None else g for t, g in zip(given, grads, strict=True)) + rest


# PyTorch operators, so that meters count them and torch.compile leaves them whole.
_LIBRARY = torch.library.Library("transformer_problems", "FRAGMENT")
_LIBRARY.define(
    "fused_attention(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor? key_mask, int num_heads, bool is_causal, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "fused_attention_backward(Tensor grad, Tensor x, Tensor qkv_weight, Tensor out_weight, Tensor? key_mask, "
    "Tensor qkv, Tensor heads, Tensor log_sums, int num_heads, bool is_causal, bool has_qkv_bias, "
    "bool has_out_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("fused_attention", _forward, "CPU")
_LIBRARY.impl("fused_attention_backward", _backward, "CPU")
_NAME = "transformer_problems::fused_attention"
_FORWARD = torch.ops.transformer_problems.fused_attention.default
_BACKWARD = torch.ops.transformer_problems.fused_attention_backward.default
torch.library.register_fake(_NAME, _fake_forward, lib=_LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradients, setup_context=_keep, lib=_LIBRARY)


@register_flop_formula(torch.ops.transformer_problems.fused_attention)
def _flops(x: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Projections and both products of attention; causal attention counts in whole, as SDPA does."""
    batch_size, num_tokens, width = x
    flops: int = 2 * batch_size * num_tokens * width * (4 * width + 2 * num_tokens)
    return flops


@register_flop_formula(torch.ops.transformer_problems.fused_attention_backward)
def _backward_flops(grad: Any, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Of each projection two gradients; of attention the scores again and four gradients."""
    batch_size, num_tokens, width = grad
    flops: int = 2 * batch_size * num_tokens * width * (8 * width + 5 * num_tokens)
    return flops
