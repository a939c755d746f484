"""Long-short range attention: half of the channels for what is far, half for what is near."""

from typing import cast

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple_of
from transformer_problems.core.fit import check_built_for
from transformer_problems.core.heads import check_input
from transformer_problems.core.slots import StreamingMixer, TokenMixer
from transformer_problems.solutions.tokens.convolution_module import MixerAndConvolutionState
from transformer_problems.solutions.tokens.lightweight_convolution import LightweightConvolution


class LongShortAttention(nn.Module):
    """[attention(first half), convolution(second half)]: each branch reads and writes its own half of the channels.

    Attention need not spend heads on neighbours, which the convolution finds by their place, and its projections have
    a quarter of the weights: of both branches together 7/4 C^2 where attention alone has 4 C^2. The halves meet in the
    feed-forward network that follows, which the paper makes as narrow as the layer (the flattened block): there
    TransformerBlock(..., feed_forward=partial(FeedForward, expansion=1)) has 3.75 C^2 weights in place of 12 C^2.

    It is causal where its attention is, and streams where that does.

    Args:
        embed_dim: C, the model width, even.
        attention: Any token mixer of width C / 2, e.g. SelfAttention.
        kernel_size: Tokens that the convolution sees, odd.
        num_heads: Kernels of the convolution; C / 2 must be a multiple of it.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the attention is built for another width.
        ArgumentError: If the width is odd, the heads do not divide its half, or the kernel is even.

    Source:
        Wu et al. 2020, arXiv:2004.11886, sections 3 and 4 and figure 3. Differs from the paper: no dropout.

    Example:
        >>> from functools import partial
        >>> from transformer_problems import LongShortAttention, SelfAttention
        >>> from transformer_problems.models.block import FeedForward, TransformerBlock
        >>> mixer = LongShortAttention(64, SelfAttention(32, num_heads=4), kernel_size=15)
        >>> block = TransformerBlock(64, mixer, feed_forward=partial(FeedForward, expansion=1))
        >>> block.mixer.is_causal
        True
    """

    def __init__(
        self,
        embed_dim: int,
        attention: TokenMixer,
        *,
        kernel_size: int = 31,
        num_heads: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple_of("embed_dim", embed_dim, 2, "half for each branch")
        check_built_for(attention, embed_dim=embed_dim // 2)
        self.embed_dim, self.is_causal = embed_dim, attention.is_causal
        self.attention = attention
        self.convolution = LightweightConvolution(
            embed_dim // 2, kernel_size, num_heads=num_heads, is_causal=self.is_causal, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        far, near = x.chunk(2, dim=-1)
        far = self.attention(far, key_mask=key_mask, positions=positions)
        return torch.cat([far, self.convolution(near, key_mask=key_mask)], dim=-1)

    def initial_state(self, batch_size: int) -> MixerAndConvolutionState:
        """The state before the first token: the attention's, and zeros for the convolution."""
        mixer = cast("StreamingMixer", self.attention).initial_state(batch_size)
        return MixerAndConvolutionState(mixer, self.convolution.initial_state(batch_size))

    def stream(self, x: Tensor, state: MixerAndConvolutionState) -> tuple[Tensor, MixerAndConvolutionState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        far, near = x.chunk(2, dim=-1)
        far, mixer = cast("StreamingMixer", self.attention).stream(far, state.mixer)
        near, convolution = self.convolution.stream(near, state.convolution)
        return torch.cat([far, near], dim=-1), MixerAndConvolutionState(mixer, convolution)
