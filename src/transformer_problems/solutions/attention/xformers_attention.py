"""xFormers' memory-efficient attention, and this library's own where it is not to be had."""

import importlib
import importlib.util
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, DeviceError, MissingDependencyError, UnknownNameError
from transformer_problems.core.slots import AttentionOp, PositionBias
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.scores import check_shapes, match_heads

XFormersPath = Literal["xformers", "own"]
XFormersBackend = Literal["auto", "xformers", "own"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class XFormersAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v by `xformers.ops.memory_efficient_attention` where that can be had.

    It answers where xFormers is installed and the tensors lie on CUDA, in float32, float16 or bfloat16, without bias
    or mask; causal attention too, unless there are more queries than keys. Every other call, and one that xFormers has
    no kernel for, is answered by MemoryEfficientAttention, which gives the same up to rounding.

    Args:
        backend: "auto" is as above; "own" never asks xFormers; "xformers" refuses the calls that it cannot answer.

    Attributes:
        runs: "xformers" where it is installed and there is a CUDA device, for the calls that it takes; else "own".
        last_run: What answered the latest call of any thread; None before the first.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If q, k, v and mask do not fit each other, or the named xFormers cannot answer a call.
        MissingDependencyError: If xFormers is named and not installed.
        DeviceError: If it is named and there is no CUDA device.

    Source:
        Lefaudeux et al. 2022, https://github.com/facebookresearch/xformers; Rabe and Staats 2021, arXiv:2112.05682.
        Differs from xFormers: heads come before tokens, fewer key heads than query heads are repeated, and there is no
        dropout.

    Example:
        >>> import torch
        >>> from transformer_problems import SelfAttention, XFormersAttention
        >>> layer = SelfAttention(64, num_heads=4, op=XFormersAttention())
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(self, *, backend: XFormersBackend = "auto") -> None:
        super().__init__()
        if backend not in get_args(XFormersBackend):
            raise UnknownNameError("backend", backend, get_args(XFormersBackend))
        if backend == "xformers" and not _can_run():
            if importlib.util.find_spec("xformers") is None:
                raise MissingDependencyError(
                    "xformers is not installed. Install the version for your torch: pip install xformers"
                )
            raise DeviceError("backend 'xformers' must have a CUDA device; this machine has none. Use backend='auto'.")
        self.backend = backend
        self.runs: XFormersPath = "xformers" if backend != "own" and _can_run() else "own"
        self.last_run: XFormersPath | None = None
        self.own = MemoryEfficientAttention()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        check_shapes(q, k, v, mask, bias)
        if self.runs == "xformers" and bias is None and mask is None and _takes(q, k, is_causal):
            try:
                y = _by_xformers(q, match_heads(q, k), match_heads(q, v), is_causal)
            except NotImplementedError:  # what xFormers raises where none of its kernels fits shapes and device
                pass
            else:
                self.last_run = "xformers"
                return y
        if self.backend == "xformers":
            raise ArgumentError(
                f"a call must be one that xFormers answers, for it is named; got {q.dtype} on {q.device} with head_dim "
                f"{q.shape[-1]}, bias {bias is not None} and mask {mask is not None}. Use backend='auto'."
            )
        self.last_run = "own"
        own: AttentionOp = self.own
        return own(q, k, v, bias=bias, mask=mask, is_causal=is_causal)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, runs={self.runs!r}"


def _can_run() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("xformers") is not None


def _takes(q: Tensor, k: Tensor, is_causal: bool) -> bool:
    fits = q.device.type == "cuda" and q.dtype in _DTYPES and bool(q.numel()) and bool(k.numel())
    return fits and not (is_causal and q.shape[-2] > k.shape[-2])


def _by_xformers(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """q: [..., H, N, D]; k, v: [..., H, M, D]; xFormers wants one leading dimension, and tokens before heads."""
    operators: Any = importlib.import_module("xformers.ops")
    biases: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    lead = q.shape[:-3]
    turned = [x.reshape(math.prod(lead), *x.shape[-3:]).transpose(1, 2) for x in (q, k, v)]
    seen = biases.LowerTriangularFromBottomRightMask() if is_causal else None
    y: Tensor = operators.memory_efficient_attention(*turned, attn_bias=seen)  # [B, N, H, D]
    return y.transpose(1, 2).reshape(*lead, q.shape[-3], q.shape[-2], v.shape[-1])
