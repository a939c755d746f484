"""Dense attention whose scaling, causal mask and softmax are one kernel of this package's own."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.slots import PositionBias
from transformer_problems.kernels.row_softmax import SoftmaxBackend, row_softmax, softmax_backend
from transformer_problems.solutions.attention.scores import check_shapes, match_heads


class KernelSoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v with all scores in memory, which one kernel reads and writes.

    Between the two products DenseAttention scales, masks and normalises, each a pass over all N x M scores; here that
    is a call of `row_softmax`, in CUDA C++ on a GPU and in C++ on a CPU, built on first use, and another backward. The
    matrix still grows as N * M. A bias, or a mask beside causality, takes a pass of its own.

    Args:
        backend: "cuda" and "cpp" are the kernels, "torch" is PyTorch's operators; "auto" is the kernel where it takes
            the scores. `backend_for` says which answers.

    Attributes:
        last_run: What answered the latest call of any thread, "cuda", "cpp" or "torch"; None before the first. Compiled
            graphs do not set it.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M]; output: [..., H, N, D].

    Raises:
        UnknownNameError: If there is no such back end.
        ArgumentError: If q, k, v and mask do not fit each other, or the back end cannot take the scores.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; CUDA: Nickolls et al. 2008, doi:10.1145/1365490.1365500.

    Example:
        >>> import torch
        >>> from transformer_problems import SelfAttention, KernelSoftmaxAttention
        >>> layer = SelfAttention(64, num_heads=4, op=KernelSoftmaxAttention())
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(self, *, backend: SoftmaxBackend | Literal["auto"] = "auto") -> None:
        super().__init__()
        known = ("auto", *get_args(SoftmaxBackend))
        if backend not in known:
            raise UnknownNameError("back end of KernelSoftmaxAttention", backend, known)
        self.backend = backend
        self.last_run: SoftmaxBackend | None = None

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
        k, v = match_heads(q, k), match_heads(q, v)
        scale = q.shape[-1] ** -0.5
        if bias is not None:
            q, scale = q * scale, 1.0  # the bias is not scaled
        scores = q @ k.transpose(-2, -1)  # [..., H, N, M]
        if bias is not None:
            scores = scores + bias.dense()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        answering = self.backend_for(scores)  # autocast may give them another dtype than the queries'
        weights = row_softmax(scores, scale=scale, is_causal=is_causal, backend=answering)
        if self.last_run != answering and not torch.compiler.is_compiling():
            self.last_run = answering
        return weights.to(v.dtype) @ v

    def backend_for(self, q: Tensor) -> SoftmaxBackend:
        """What answers for queries, whose dtype and device the scores have."""
        return softmax_backend(q) if self.backend == "auto" else self.backend

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
