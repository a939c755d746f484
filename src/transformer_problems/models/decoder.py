"""The baseline decoder: a causal Transformer that predicts the next token."""

import torch
from torch import Tensor, nn

from transformer_problems.core.slots import LongSkips, PositionEncoding
from transformer_problems.models.block import ResidualFactory
from transformer_problems.models.stack import MixerFactory, PositionSampler, StackState, TransformerStack
from transformer_problems.solutions.normalization.pre_norm import PreNorm


class Decoder(nn.Module):
    """A pre-norm causal language model with tied input and output embeddings.

    Args:
        vocab_size: V.
        embed_dim: C.
        num_layers: L.
        mixer: Called once a layer; returns that layer's causal token mixer.
        position: An encoding that adds to the embeddings. Default none.
        sample_positions: Chooses positions other than 0, 1, 2, ... Default none.
        residual: Makes what joins each sublayer to its input. Default PreNorm.
        skips: Leads from early layers to late ones. Default none.

    Shape:
        tokens: [B, N] int; output: logits [B, N, V].

    Example:
        >>> from transformer_problems import Decoder, RotaryEmbedding, SelfAttention
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, position=RotaryEmbedding(head_dim=16))
        >>> model = Decoder(vocab_size=256, embed_dim=64, num_layers=2, mixer=mixer)
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        mixer: MixerFactory,
        *,
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
            is_causal=True,
            position=position,
            sample_positions=sample_positions,
            residual=residual,
            skips=skips,
            device=device,
            dtype=dtype,
        )

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return self._logits(self.body(tokens, key_mask=key_mask, positions=positions))

    def initial_state(self, batch_size: int) -> StackState:
        """The state before the first token: whatever each layer's mixer needs."""
        return self.body.initial_state(batch_size)

    def stream(self, tokens: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """Logits of the next chunk, [B, n] -> [B, n, V], and the state after it."""
        hidden, state = self.body.stream(tokens, state)
        return self._logits(hidden), state

    def _logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.body.embedding.weight)
