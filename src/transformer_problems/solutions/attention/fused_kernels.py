"""PyTorch's fused attention and this package's kernels behind one signature, and which of them is faster."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.errors import CombinationError
from transformer_problems.core.slots import PositionBias
from transformer_problems.kernels.flash_attention_amx import amx_refusal, flash_attention_amx, has_amx
from transformer_problems.kernels.flash_attention_triton import flash_attention_triton, has_triton, triton_refusal
from transformer_problems.kernels.race import fastest
from transformer_problems.solutions.attention.score_tiles import masked
from transformer_problems.solutions.attention.scores import causal_mask, key_mask_of, match_heads

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_WIDENED_SCORES = 2**14  # scores of single queries for which a float32 copy of keys and values is small and pays
_RACED_SCORES = 2**20  # a millisecond or two; fewer would not repay a race
_RACED_LENGTH = 1024  # longer calls go as those of this length do, a race of which takes some tenths of a second
_TILE_ROWS = 16  # fewer queries do not repay the packing of keys and values


def by_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PositionBias | None,
    mask: Tensor | None,
    is_causal: bool,
    *,
    widened: bool = False,
) -> Tensor:
    """PyTorch's kernel, which wants four dimensions, one mask without empty rows, and N = M where it is causal.

    q: [..., H, N, D]; k, v: [..., H, M, D]. `widened`, which `is_better_widened` has to allow, computes in float32 and
    rounds the output.
    """
    lead, num_queries, num_keys = q.shape[:-3], q.shape[-2], k.shape[-2]
    native_causal = is_causal and bias is None and mask is None and bool(num_queries == num_keys)  # bool: for exports
    if is_causal and not native_causal and num_queries > 1:  # one query is the last token and sees every key
        causal = causal_mask(num_queries, num_keys, q.device)
        mask = causal if mask is None else mask & causal
    empty = None
    if mask is not None:
        empty = ~mask.any(dim=-1, keepdim=True)
        mask = mask | empty
    attn_mask = mask if bias is None else masked(bias.dense().to(q.dtype), mask)
    q, k, v = _of_four_dimensions(q, k, v)
    attn_mask = None if attn_mask is None else _flattened(attn_mask, lead)
    if widened and _trains(q, k, v):
        added = None if attn_mask is None else torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, float("-inf"))
        y: Tensor = _Widened.apply(q, k, v, added, native_causal)  # type: ignore[no-untyped-call]
    else:
        dtype = v.dtype
        if widened:
            q, k, v = q.float(), k.float(), v.float()
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask.float()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=native_causal).to(dtype)
    y = y.reshape(*lead, *y.shape[-3:])
    return y if empty is None else y.masked_fill(empty, 0.0)


class _Widened(torch.autograd.Function):
    """PyTorch's CPU kernel in float32 both ways, which saves q, k, v and the output in half precision as they came.

    Left to autograd, the float32 copies would be saved.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        wide = (x.float() for x in (q, k, v))
        out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, is_causal, attn_mask=mask)
        rounded: Tensor = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, rounded, log_sums)
        ctx.is_causal = is_causal
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        wide = (x.float() for x in (grad_out, q, k, v, out))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, log_sums, 0.0, ctx.is_causal, attn_mask=mask
        )
        return *(grad.to(q.dtype) for grad in grads), None, None


def by_kernel(
    name: Literal["triton", "amx"],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PositionBias | None,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """This package's kernels, which want four dimensions and know no mask but of keys.

    q: [..., H, N, D]; k, v: [..., G, M, D].

    Raises:
        ArgumentError: If there is a bias or another mask, or the kernels cannot take the tensors.
    """
    if bias is not None:
        raise CombinationError(
            f"bias must be None for backend={name!r}; got that of {type(bias.encoding).__name__}. Use backend='auto'."
        )
    lead, num_keys = q.shape[:-3], k.shape[-2]
    key_mask = None if mask is None else key_mask_of(mask, f"FlashAttention(backend={name!r})")
    if key_mask is not None:
        key_mask = key_mask.expand(*lead, num_keys).reshape(math.prod(lead), num_keys)
    kernel = flash_attention_triton if name == "triton" else flash_attention_amx
    y = kernel(*_of_four_dimensions(q, k, v), key_mask=key_mask, is_causal=is_causal)
    return y.reshape(*lead, *y.shape[-3:])


def triton_wins(
    q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether the Triton kernels take the call and have won the race of its kind against PyTorch's.

    Kinds differ by device, dtype, heads, lengths up to the next power of two, masks, and whether gradients are asked
    for. A compiled graph, and a CUDA graph being captured, holds PyTorch's.
    """
    if q.device.type != "cuda" or q.dtype not in _HALF or bias is not None or torch.compiler.is_compiling():
        return False
    if not has_triton():
        return False
    q, k, v = _of_four_dimensions(q, k, v)
    if not _is_of_keys(mask) or not q.numel() or not k.numel() or triton_refusal(q, k, v) is not None:
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    shapes = [(1, x.shape[1], 2 ** (x.shape[2] - 1).bit_length(), x.shape[3]) for x in (q, k, v)]
    return _wins("triton", shapes, q, mask is not None, is_causal, _trains(q, k, v))


def amx_wins(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether the kernel for a CPU's matrix instructions takes the call and has won the race of its kind.

    Kinds differ by heads, lengths up to the next power of two, masks and threads. Calls that ask for gradients are not
    taken. A compiled graph holds PyTorch's.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or bias is not None or torch.compiler.is_compiling():
        return False
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if num_queries < _TILE_ROWS or q.shape[:-1].numel() * num_keys < _RACED_SCORES:
        return False
    if not _is_of_keys(mask) or not has_amx():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    q, k, v = _of_four_dimensions(q, k, v)
    if amx_refusal(q, k, v) is not None:
        return False
    lengths = [min(_RACED_LENGTH, 2 ** (length - 1).bit_length()) for length in (num_queries, num_keys, num_keys)]
    batch_size = max(1, _RACED_SCORES // (q.shape[1] * lengths[0] * lengths[1]))
    shapes = [(batch_size, x.shape[1], length, x.shape[3]) for x, length in zip((q, k, v), lengths, strict=True)]
    return _wins("amx", shapes, q, mask is not None, is_causal, False)


def _is_of_keys(mask: Tensor | None) -> bool:
    return mask is None or (mask.dim() > 1 and mask.shape[-2] == 1 and (mask.dim() == 2 or mask.shape[-3] == 1))


def _wins(
    name: Literal["triton", "amx"],
    shapes: Sequence[tuple[int, ...]],
    q: Tensor,
    with_mask: bool,
    is_causal: bool,
    trains: bool,
) -> bool:
    """Whether the kernels win the race on inputs of these shapes, of q's dtype and device."""
    dtype, device = q.dtype, q.device
    kind = (str(device), str(dtype), *shapes[0], *shapes[1][1:3], with_mask, is_causal, trains)
    if device.type == "cpu":
        kind += (torch.get_num_threads(),)

    def prepare() -> dict[str, Callable[[], object]]:
        sample = _sample(shapes, dtype, device, trains)
        q, k, v = sample
        keys = torch.ones(1, 1, 1, shapes[1][2], dtype=torch.bool, device=device) if with_mask else None
        return {
            "sdpa": lambda: _step(by_sdpa(q, match_heads(q, k), match_heads(q, v), None, keys, is_causal), sample),
            name: lambda: _step(by_kernel(name, q, k, v, None, keys, is_causal), sample),
        }

    return fastest(("attention", *kind), prepare, device) == name


def is_better_widened(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None) -> bool:
    """Whether PyTorch's CPU kernel is faster on float32 copies of half-precision inputs.

    It takes a few single queries 2 to 3x slower. Training without a bias is raced, once for each dtype: a step took 2
    to 19 times as long in half precision as in float32 where no matrix instructions serve the dtype (a Xeon with
    AVX-512, PyTorch 2.13).
    """
    if q.device.type != "cpu" or q.dtype not in _HALF:
        return False
    if not _trains(q, k, v):
        return q.shape[-2] == 1 and q.shape[:-1].numel() * k.shape[-2] <= _WIDENED_SCORES
    if bias is not None or torch.compiler.is_compiling():
        return False
    if not q.numel() or not k.numel() or q.shape[:-2] != k.shape[:-2] or k.shape != v.shape:
        return False  # PyTorch has another kernel for these
    dtype, device = q.dtype, q.device

    def prepare() -> dict[str, Callable[[], object]]:
        sample = _sample([(1, 2, 128, 64)] * 3, dtype, device, True)
        q, k, v = sample
        return {
            "sdpa": lambda: _step(by_sdpa(q, k, v, None, None, True), sample),
            "sdpa in float32": lambda: _step(by_sdpa(q, k, v, None, None, True, widened=True), sample),
        }

    kind = ("attention", str(device), str(dtype), torch.get_num_threads())
    return fastest(kind, prepare, device) == "sdpa in float32"


def _sample(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, trains: bool
) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)  # the caller's stream of random numbers stays as it is
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype, device=device).requires_grad_(trains) for shape in shapes
    )


def _step(out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """With the backward pass, where the inputs ask for one."""
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.ones_like(out))


def _trains(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _of_four_dimensions(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in tensors)  # -1 fails without queries


def _flattened(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask or bias broadcastable to [*lead, H, N, M] with `lead` as one dimension."""
    rank = len(lead) + 3
    mask = mask[(None,) * (rank - mask.dim())]
    return mask.expand(*lead, *mask.shape[-3:]).reshape(math.prod(lead), *mask.shape[-3:])
