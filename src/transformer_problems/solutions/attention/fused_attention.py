"""Fused multi-head attention: one call from the layer's input to its output."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.heads import check_input
from transformer_problems.core.inputs import shown
from transformer_problems.kernels.fused_attention import FusedBackend, fused_attention, fused_backend
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention

_EXACT = (DenseAttention, FlashAttention, MemoryEfficientAttention)


class FusedSelfAttention(nn.Module):
    """Multi-head self-attention as one operator: all projections, the softmax, the weighted sum and the output layer.

    On a CPU in float32 and float64 a kernel of this package's own answers, forward and backward, and hands a few
    sequences at a time through all steps, so that what lies between stays in caches where these sequences fit.
    Elsewhere PyTorch's operators follow one another, with one product for queries, keys and values. Arithmetic and
    results are those of SelfAttention; there are no position encodings, grouped heads or streaming.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        is_causal: Token i sees only tokens up to i.
        bias: Projections carry a bias term.
        backend: "cpp" is the kernel, "torch" PyTorch's operators; "auto" is the kernel where it takes the input.
            `backend_for` says which answers.

    Attributes:
        last_run: What answered the latest call of any thread, "cpp" or "torch"; None before the first. Compiled graphs
            do not set it.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; output: [B, N, C]. `positions` have no effect.

    Raises:
        ArgumentError: If the heads do not divide the width, or "cpp" was asked for and cannot take the input.
        UnknownNameError: If there is no such back end.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; fused: Wang et al. 2020, arXiv:2010.13887. Differs from
        the paper: a kernel for CPUs, which multiplies by itself, and with gradients.

    Example:
        >>> import torch
        >>> from transformer_problems import FusedSelfAttention
        >>> layer = FusedSelfAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        is_causal: bool = True,
        bias: bool = False,
        backend: FusedBackend | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        known = ("auto", *get_args(FusedBackend))
        if backend not in known:
            raise UnknownNameError("back end of FusedSelfAttention", backend, known)
        self.embed_dim, self.num_heads, self.is_causal, self.backend = embed_dim, num_heads, is_causal, backend
        self.last_run: FusedBackend | None = None
        self.qkv_proj = Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def from_layer(
        cls, layer: SelfAttention, *, backend: FusedBackend | Literal["auto"] = "auto"
    ) -> "FusedSelfAttention":
        """The same layer fused, with copies of its weights.

        Raises:
            ArgumentError: If it is no SelfAttention.
            CombinationError: If the layer has a position encoding, grouped heads, an op other than exact softmax
                attention, or projections that are one already.
        """
        _check_fusible(layer)
        parts = (layer.q_proj, layer.k_proj, layer.v_proj)
        weight, bias = layer.out_proj.weight, layer.out_proj.bias
        fused = cls(
            layer.embed_dim,
            layer.num_heads,
            is_causal=layer.is_causal,
            bias=bias is not None,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        fused.qkv_proj.weight.copy_(torch.cat([part.weight for part in parts]))
        fused.out_proj.weight.copy_(weight)
        if bias is not None:
            fused.qkv_proj.bias.copy_(torch.cat([part.bias for part in parts]))
            fused.out_proj.bias.copy_(bias)
        return fused.train(layer.training)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        answering = self.backend_for(x)
        y = fused_attention(
            x,
            self.qkv_proj.weight,
            self.qkv_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            num_heads=self.num_heads,
            is_causal=self.is_causal,
            key_mask=key_mask,
            backend=answering,
        )
        if self.last_run != answering and not torch.compiler.is_compiling():
            self.last_run = answering
        return y

    def backend_for(self, x: Tensor) -> FusedBackend:
        """What answers for an input."""
        return fused_backend(x) if self.backend == "auto" else self.backend

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}, backend={self.backend!r}"


def _check_fusible(layer: SelfAttention) -> None:
    if not isinstance(layer, SelfAttention):
        raise ArgumentError(f"layer must be a SelfAttention to be fused; got {shown(layer)}. Fuse each one of a model.")
    for what, fits, found in (
        ("an op of exact softmax attention", type(layer.op) in _EXACT, type(layer.op).__name__),
        ("no position encoding", layer.position is None, type(layer.position).__name__),
        ("as many key heads as query heads", layer.num_kv_heads == layer.num_heads, layer.num_kv_heads),
        ("separate projections", layer.qkv_proj is None, type(layer.qkv_proj).__name__),
    ):
        if not fits:
            raise CombinationError(
                f"layer must have {what} to be fused; got {found}. Keep SelfAttention, and fuse its projections alone "
                "with FuseProjections."
            )
