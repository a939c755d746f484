"""The Conformer block: attention for what is far, convolution for what is near, between two half feed-forwards."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_flag, require_positive_int
from transformer_problems.core.fit import check_mixer_fit
from transformer_problems.core.heads import check_input
from transformer_problems.core.inputs import check_same_dtype
from transformer_problems.core.slots import StreamingMixer, TokenMixer
from transformer_problems.solutions.tokens.convolution_module import (
    ConvolutionModule,
    ConvolutionNorm,
    MixerAndConvolutionState,
)


class ConformerBlock(nn.Module):
    """norm(x + FF / 2) after x + convolution, after x + mixer, after x + FF / 2, each read through a layer norm.

    The convolution module knows what is near by its place and the mixer reaches all else, so a layer need not learn
    from examples alone that neighbours belong together. It is called as TransformerBlock is, and has a second
    feed-forward network and some 3 C^2 + kernel_size * C parameters more.

    It streams where its mixer does, with the convolution causal; see ConvolutionModule for batch norm. With
    ChunkedAttention and its look-ahead it takes whole chunks, as that does.

    Args:
        embed_dim: C, the model width.
        mixer: Any token mixer of that width. The paper's is SelfAttention(..., position=TransformerXLRelative(...),
            is_causal=False).
        kernel_size: Frames that the convolution sees, odd.
        causal_convolution: They are a frame's own and those before it.
        norm: Of the convolution module, "batch" or "layer".
        expansion: F / C, of both feed-forward networks.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If the mixer is a class, or built for another width.
        ArgumentError: If a size is not positive, the kernel even, or the mixer none, such as a function that makes
            one; if an input's shape or dtype is wrong, or a stream is asked of what cannot stream.
        UnknownNameError: If there is no such norm.

    Source:
        Gulati et al. 2020, arXiv:2005.08100, sections 2.1 to 2.4 and figure 1. Differs from the paper: no dropout; the
        kernel has 31 frames where the paper has 32.

    Example:
        >>> import torch
        >>> from transformer_problems import ConformerBlock, SelfAttention, TransformerXLRelative
        >>> attention = SelfAttention(64, num_heads=4, position=TransformerXLRelative(64, 4), is_causal=False)
        >>> ConformerBlock(64, attention, kernel_size=15)(torch.randn(8, 100, 64)).shape
        torch.Size([8, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: TokenMixer,
        *,
        kernel_size: int = 31,
        causal_convolution: bool = False,
        norm: ConvolutionNorm = "batch",
        expansion: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim, expansion=expansion)
        check_mixer_fit(mixer, embed_dim=embed_dim)
        require_flag(causal_convolution=causal_convolution)
        self.embed_dim = embed_dim
        self.is_causal = mixer.is_causal and causal_convolution
        self.first_half = _HalfStep(embed_dim, expansion, device, dtype)
        self.mixer_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.convolution_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.convolution = ConvolutionModule(
            embed_dim, kernel_size, is_causal=causal_convolution, norm=norm, device=device, dtype=dtype
        )
        self.second_half = _HalfStep(embed_dim, expansion, device, dtype)
        self.final_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        x = self.first_half(x)
        x = x + self.mixer(self.mixer_norm(x), key_mask=key_mask, positions=positions)
        x = x + self.convolution(self.convolution_norm(x), key_mask=key_mask)
        y: Tensor = self.final_norm(self.second_half(x))
        return y

    def initial_state(self, batch_size: int) -> MixerAndConvolutionState:
        """The state before the first token: the mixer's, and zeros for the convolution."""
        mixer = cast("StreamingMixer", self.mixer).initial_state(batch_size)
        return MixerAndConvolutionState(mixer, self.convolution.initial_state(batch_size))

    def stream(self, x: Tensor, state: MixerAndConvolutionState) -> tuple[Tensor, MixerAndConvolutionState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        x = self.first_half(x)
        mixed, mixer_state = cast("StreamingMixer", self.mixer).stream(self.mixer_norm(x), state.mixer)
        x = x + mixed
        convolved, convolution_state = self.convolution.stream(self.convolution_norm(x), state.convolution)
        y: Tensor = self.final_norm(self.second_half(x + convolved))
        return y, MixerAndConvolutionState(mixer_state, convolution_state)


class _HalfStep(nn.Module):
    """x + FF(norm(x)) / 2 with a SiLU inside, section 2.3 of the paper."""

    def __init__(
        self, embed_dim: int, expansion: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.up = nn.Linear(embed_dim, expansion * embed_dim, device=device, dtype=dtype)
        self.down = nn.Linear(expansion * embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_same_dtype("x", x, self.norm.weight, "ConformerBlock")
        step: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return x + 0.5 * step
