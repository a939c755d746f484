"""One Transformer layer: a token mixer and a feed-forward network, each behind a norm and a skip."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import StreamingMixer, TokenMixer


class PartFactory(Protocol):
    """Makes a layer's norm or feed-forward network, [..., C] -> [..., C]."""

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


class TransformerBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)): the pre-norm layer.

    Args:
        embed_dim: C, the model width.
        mixer: Any token mixer of that width.
        norm: Makes the norm before the mixer and the one before the feed-forward network.
        feed_forward: Makes the feed-forward network.

    Shape:
        x: [B, N, C]; output: [B, N, C].

    Source:
        Xiong et al. 2020, arXiv:2002.04745, figure 1b.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: TokenMixer,
        *,
        norm: PartFactory = nn.LayerNorm,
        feed_forward: PartFactory = FeedForward,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer_norm = norm(embed_dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.feed_forward_norm = norm(embed_dim, device=device, dtype=dtype)
        self.feed_forward = feed_forward(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), key_mask=key_mask, positions=positions)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y

    def initial_state(self, batch_size: int) -> Any:
        return cast("StreamingMixer", self.mixer).initial_state(batch_size)

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = cast("StreamingMixer", self.mixer).stream(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), state
