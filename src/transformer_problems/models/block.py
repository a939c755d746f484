"""One Transformer layer: a token mixer and a feed-forward network, each joined to its input by a residual."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import Residual, StreamingMixer, TokenMixer
from transformer_problems.solutions.normalization.pre_norm import PreNorm


class PartFactory(Protocol):
    """Makes a layer's feed-forward network, [..., C] -> [..., C]."""

    def __call__(
        self, embed_dim: int, /, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module: ...


class FeedForward(nn.Module):
    """Two linear layers around a GELU, [..., C] -> [..., C], with inner width F = `expansion` * C.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.3. Differs from the paper: GELU in place of ReLU.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        expansion: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, expansion * embed_dim, device=device, dtype=dtype)
        self.down = nn.Linear(expansion * embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


class ResidualFactory(Protocol):
    """Makes what joins a sublayer to its input, for layers of width C."""

    def __call__(
        self, embed_dim: int, /, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Residual: ...


class TransformerBlock(nn.Module):
    """A token mixer, then a feed-forward network, each joined to its input by a residual.

    Args:
        embed_dim: C, the model width.
        mixer: Any token mixer of that width.
        residual: Makes the residual of the mixer and that of the feed-forward network. Default the pre-norm layer:
            x + mixer(norm(x)), then x + feed_forward(norm(x)).
        feed_forward: Makes the feed-forward network.

    Shape:
        x: [B, N, C]; output: [B, N, C].

    Source:
        Xiong et al. 2020, arXiv:2002.04745, figure 1.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: TokenMixer,
        *,
        residual: ResidualFactory = PreNorm,
        feed_forward: PartFactory = FeedForward,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer_residual = residual(embed_dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.feed_forward_residual = residual(embed_dim, device=device, dtype=dtype)
        self.feed_forward = feed_forward(embed_dim, device=device, dtype=dtype)
        for joint, sublayer in ((self.mixer_residual, mixer), (self.feed_forward_residual, self.feed_forward)):
            if hasattr(joint, "adopt"):
                joint.adopt(sublayer)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        x = self.mixer_residual(x, lambda h: self.mixer(h, key_mask=key_mask, positions=positions))
        return self.feed_forward_residual(x, self.feed_forward)

    def initial_state(self, batch_size: int) -> Any:
        return cast("StreamingMixer", self.mixer).initial_state(batch_size)

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        def mix(h: Tensor) -> Tensor:
            nonlocal state
            y, state = cast("StreamingMixer", self.mixer).stream(h, state)
            return y

        x = self.mixer_residual(x, mix)
        return self.feed_forward_residual(x, self.feed_forward), state
