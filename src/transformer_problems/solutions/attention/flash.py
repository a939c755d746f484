"""FlashAttention: exact softmax attention without the N x M matrix in memory."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.slots import PositionBias
from transformer_problems.kernels.flash_attention_amx import require_amx
from transformer_problems.solutions.attention.fused_kernels import (
    amx_wins,
    by_kernel,
    by_sdpa,
    is_better_widened,
    triton_wins,
)
from transformer_problems.solutions.attention.score_tiles import RunningSoftmax, ScoreTiles, part_of, wide
from transformer_problems.solutions.attention.scores import check_shapes, match_heads

Backend = Literal["auto", "sdpa", "tiled", "triton", "amx"]


class FlashAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v computed tile by tile, in memory that grows as N + M.

    Keys are taken in tiles with a softmax that is corrected as larger scores appear; only the output and each row's
    log-sum-exp are kept, and the backward pass computes the tiles again. The arithmetic still grows as N * M; causal
    attention leaves out the tiles above the diagonal.

    Memory is linear for attention without a mask, with key masks and, in "tiled", with a bias that needs no gradient.
    A bias that needs one is formed whole. "sdpa" holds an N x M mask for every bias, for a causal mask beside a key
    mask, and for causal attention of 1 < N < M; "triton" and "amx" never hold one. "amx" holds a copy of k and v.

    Half precision on a CPU is computed in float32 where PyTorch's kernel is slower than that: for a few single queries,
    and for training without a bias where a short race, run once, finds it so (on processors without matrix instructions
    for the dtype). What is saved for the backward pass stays in half precision.

    Args:
        backend: "sdpa" is PyTorch's scaled_dot_product_attention, which picks its fastest kernel; "tiled" is the
            algorithm written out, on any device; "triton" is this package's kernels for GPUs, without a bias and with
            key masks only (`flash_attention_triton` says what else); "amx" is its kernel for the matrix instructions
            of x86 processors, for bfloat16 without gradients, without a bias and with key masks only
            (`flash_attention_amx` says what else). "auto" is "sdpa", but for half precision on a GPU where "triton",
            and for a million scores or more on a CPU where "amx" takes the call and wins a race against it, run once
            for each kind of call. Compiled graphs and exports hold "sdpa".
        block_size: Queries and keys in one tile of "tiled".

    Attributes:
        runs: The back end that answers: "sdpa", "tiled", "triton" or "amx". With "auto" it is "sdpa", which answers
            whatever the kernels do not; `last_run` says which did.
        last_run: What answered the latest call of any thread: "sdpa", "sdpa in float32", "tiled", "triton" or "amx";
            None before the first. Compiled graphs do not set it.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        UnknownNameError: If there is no such back end.
        MissingDependencyError: If "triton" is asked for and not installed, or "amx" and there is no C++ compiler.
        DeviceError: If "amx" is asked for and the processor has no such instructions.
        KernelBuildError: If "amx" is asked for and cannot be built here.
        ArgumentError: If `block_size` is not positive, q, k, v and mask do not fit each other, or "triton" or "amx" was
            asked for and cannot take the call.

    Source:
        Dao et al. 2022, arXiv:2205.14135, algorithms 1, 2 and 4. Differs from the paper: queries are the outer loop
        (as in Dao 2023, arXiv:2307.08691), tiles are square and sized for caches, not for a GPU's shared memory, and
        there is no dropout.

    Example:
        >>> import torch
        >>> from transformer_problems import FlashAttention, SelfAttention
        >>> layer = SelfAttention(64, num_heads=4, op=FlashAttention(backend="tiled"))
        >>> layer(torch.randn(2, 100, 64)).shape, layer.op.last_run
        (torch.Size([2, 100, 64]), 'tiled')
    """

    def __init__(self, *, backend: Backend = "auto", block_size: int = 128) -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise UnknownNameError("backend", backend, get_args(Backend))
        require_positive_int(block_size=block_size)
        if backend == "triton":
            require("triton", extra="gpu")
        if backend == "amx":
            require_amx("FlashAttention(backend='amx')")
        self.runs: Literal["sdpa", "tiled", "triton", "amx"] = "sdpa" if backend == "auto" else backend
        self._may_race = backend == "auto"
        self.accepts_bias = backend not in ("triton", "amx")
        self.block_size = block_size
        self.last_run: str | None = None

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
        kernel = self._kernel(q, k, v, bias, mask, is_causal)
        if kernel is not None:
            self._tell(kernel)
            return by_kernel(kernel, q, k, v, bias, mask, is_causal)
        k, v = match_heads(q, k), match_heads(q, v)
        if self.runs == "sdpa":
            widened = is_better_widened(q, k, v, bias)
            self._tell("sdpa in float32" if widened else "sdpa")
            return by_sdpa(q, k, v, bias, mask, is_causal, widened=widened)
        self._tell("tiled")
        dense = bias.dense() if bias is not None and _needs_gradient(bias) else None
        lazy = bias if dense is None else None
        out: Tensor = _Tiled.apply(q, k, v, dense, lazy, mask, is_causal, self.block_size)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return f"runs={self.runs!r}, block_size={self.block_size}"

    def _kernel(
        self, q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None, is_causal: bool
    ) -> Literal["triton", "amx"] | None:
        """That of this package which answers the call, if one does."""
        if self.runs == "triton" or self.runs == "amx":
            return self.runs
        if not self._may_race:
            return None
        if triton_wins(q, k, v, bias, mask, is_causal):
            return "triton"
        return "amx" if amx_wins(q, k, v, bias, mask, is_causal) else None

    def _tell(self, ran: str) -> None:
        if self.last_run != ran and not torch.compiler.is_compiling():
            self.last_run = ran


def _needs_gradient(bias: PositionBias) -> bool:
    """Whether anything the bias is made of is being trained; asked of its first score alone."""
    first = slice(0, 1)
    return bias.tile(first, first).requires_grad


class _Tiled(torch.autograd.Function):
    """Algorithms 1 and 4 of the paper; saves its inputs, the output and the log-sum-exp of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor | None,
        lazy: PositionBias | None,
        mask: Tensor | None,
        is_causal: bool,
        block_size: int,
    ) -> Tensor:
        scores = ScoreTiles(q, k, dense, lazy, mask, is_causal, block_size, block_size)
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = wide(q).new_empty(*q.shape[:-1], 1)
        for rows in scores.rows():
            softmax = RunningSoftmax.of_no_key(scores, v, rows)
            for columns in scores.columns(rows):
                softmax = softmax.with_tile(scores.tile(rows, columns), v[..., columns, :])
            out[..., rows, :], log_sums[..., rows, :] = softmax.output(), softmax.log_sum()
        ctx.save_for_backward(q, k, v, dense, mask, out, log_sums)
        ctx.lazy, ctx.is_causal, ctx.block_size = lazy, is_causal, block_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, dense, mask, out, log_sums = ctx.saved_tensors
        scores = ScoreTiles(q, k, dense, ctx.lazy, mask, ctx.is_causal, ctx.block_size, ctx.block_size)
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=log_sums.dtype) for x in (q, k, v))
        grad_bias = None if dense is None else torch.zeros_like(dense, dtype=log_sums.dtype)
        for rows in scores.rows():
            row_q, row_grad = wide(q[..., rows, :]), wide(grad_out[..., rows, :])
            mean_grad = (row_grad * out[..., rows, :]).sum(dim=-1, keepdim=True)
            for columns in scores.columns(rows):
                weights = (scores.tile(rows, columns) - log_sums[..., rows, :]).exp()
                grad_v[..., columns, :] += weights.mT @ row_grad
                grad_weights = row_grad @ wide(v[..., columns, :]).mT
                grad_scores = weights * (grad_weights - mean_grad)
                grad_q[..., rows, :] += grad_scores @ wide(k[..., columns, :]) * scale
                grad_k[..., columns, :] += grad_scores.mT @ row_q * scale
                if grad_bias is not None:
                    part = part_of(grad_bias, rows, columns)
                    part += grad_scores.sum_to_size(part.shape)
        if grad_bias is not None:
            grad_bias = grad_bias.to(dense.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None, None, None
