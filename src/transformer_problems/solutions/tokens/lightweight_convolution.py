"""Lightweight convolution: a depthwise convolution whose few kernels are shared and sum to one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple
from transformer_problems.core.fit import check_same_batch, check_start
from transformer_problems.core.heads import check_input
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.tokens.convolution_module import ConvolutionState, check_kernel_size


class LightweightConvolution(nn.Module):
    """out(convolution(glu(in(x)))): each token is a weighted mean of its neighbours' channels, by their place alone.

    The C / H channels of a head share one kernel of positive weights that sum to one, a softmax of what is learned, so
    that a layer has H * kernel_size weights for places, whatever its width. Costs O(N * C * (3 C + kernel_size)).
    Tokens masked by `key_mask` enter the convolution as the zeros that stand beyond both ends. `positions` are ignored.

    The causal form sees a token's own and the kernel_size - 1 before it, which is all that a stream keeps.

    Args:
        embed_dim: C, the model width.
        kernel_size: Tokens that the convolution sees; odd, so that as many are on each side.
        num_heads: H, kernels; C must be a multiple of it.
        is_causal: All of them are a token's own and those before it.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: ignored; output: [B, N, C].

    Raises:
        ArgumentError: If the heads do not divide the width, the kernel is even, or a stream is asked of what cannot
            stream.

    Source:
        Wu et al. 2019, arXiv:1901.10430, section 3. Differs from the paper: no kernel weights are dropped in training.

    Example:
        >>> import torch
        >>> from transformer_problems import LightweightConvolution
        >>> mixer = LightweightConvolution(64, kernel_size=15)
        >>> mixer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        kernel_size: int = 31,
        *,
        num_heads: int = 4,
        is_causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        check_kernel_size(kernel_size)
        self.embed_dim, self.kernel_size, self.is_causal = embed_dim, kernel_size, is_causal
        self.in_proj = Linear(embed_dim, 2 * embed_dim, bias=False, device=device, dtype=dtype)
        self.place_scores = nn.Parameter(torch.empty(num_heads, kernel_size, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.place_scores)
        self.out_proj = Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        gated = F.glu(self.in_proj(x), dim=-1)
        if key_mask is not None:
            gated = gated.masked_fill(~key_mask[..., None], 0.0)
        around = self.kernel_size - 1
        before = around if self.is_causal else around // 2
        return self._convolve(F.pad(gated, (0, 0, before, around - before)))

    def initial_state(self, batch_size: int) -> ConvolutionState:
        """The state before the first token: zeros."""
        check_start(batch_size, is_causal=self.is_causal)
        return ConvolutionState(self.place_scores.new_zeros(batch_size, self.kernel_size - 1, self.embed_dim))

    def stream(self, x: Tensor, state: ConvolutionState) -> tuple[Tensor, ConvolutionState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.frames))
        if x.shape[1] == 0:
            return x, state
        window = torch.cat([state.frames, F.glu(self.in_proj(x), dim=-1)], dim=1)
        tail = window[:, x.shape[1] :].clone()  # a copy, or the state would hold the whole chunk
        return self._convolve(window), ConvolutionState(tail, state.num_seen + x.shape[1])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, num_heads={len(self.place_scores)}, is_causal={self.is_causal}"

    def _convolve(self, window: Tensor) -> Tensor:
        """All that follows the gate. window: [B, kernel_size - 1 + N, C]; output: [B, N, C]."""
        kernels = self.place_scores.softmax(dim=-1).repeat_interleave(self.embed_dim // len(self.place_scores), dim=0)
        y: Tensor = self.out_proj(F.conv1d(window.mT, kernels[:, None], groups=self.embed_dim).mT)
        return y
