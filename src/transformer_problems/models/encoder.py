"""The baseline encoder: a bidirectional Transformer for masked prediction and classification."""

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import LongSkips, PositionEncoding
from transformer_problems.models.block import ResidualFactory
from transformer_problems.models.stack import MixerFactory, PositionSampler, TransformerStack
from transformer_problems.solutions.normalization.pre_norm import PreNorm


class Encoder(nn.Module):
    """A pre-norm bidirectional Transformer with a linear head on every token.

    Args:
        vocab_size: V.
        embed_dim: C.
        num_layers: L.
        mixer: Called once a layer; returns that layer's bidirectional token mixer.
        num_outputs: Width of the head: V for masked prediction (the default), classes for classification.
        position: An encoding that adds to the embeddings. Default none.
        sample_positions: Chooses positions other than 0, 1, 2, ... Default none.
        residual: Makes what joins each sublayer to its input. Default PreNorm.
        skips: Leads from early layers to late ones. Default none.

    Shape:
        tokens: [B, N] int; key_mask: [B, N] bool; output: [B, N, num_outputs].
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        mixer: MixerFactory,
        *,
        num_outputs: int | None = None,
        position: PositionEncoding | None = None,
        sample_positions: PositionSampler | None = None,
        residual: ResidualFactory = PreNorm,
        skips: LongSkips | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.body = TransformerStack(
            vocab_size,
            embed_dim,
            num_layers,
            mixer,
            is_causal=False,
            position=position,
            sample_positions=sample_positions,
            residual=residual,
            skips=skips,
            device=device,
            dtype=dtype,
        )
        self.head = nn.Linear(embed_dim, num_outputs or vocab_size, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.body(tokens, key_mask=key_mask, positions=positions))
        return y
