"""An encoder whose sequence grows shorter from layer to layer."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.inputs import check_tokens
from transformer_problems.core.token_slots import Attended, TokenReducer, Tokens
from transformer_problems.models.block import TransformerBlock
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.watched import WatchedAttention


class ReducingEncoder(nn.Module):
    """Runs an encoder's own layers, and between attention and feed-forward of each lets a reducer shorten the sequence.

    The encoder may be trained already: it keeps its parameters, and with no reducers gives what it gave. Its layers
    attend through WatchedAttention, which has no parameters and, unwatched, is DenseAttention.

    Args:
        encoder: Its mixers are SelfAttention(..., op=WatchedAttention(), is_causal=False).
        reducers: One a layer; None leaves that layer's tokens as they are.

    Shape:
        tokens: [B, N] int; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, num_outputs], zeros where a
        token has left, the same for tokens that were merged.

    Raises:
        ArgumentError: If there is not one entry of `reducers` for each layer, or an input's shape or dtype is wrong.
        CombinationError: If a layer does not attend through WatchedAttention, the encoder has long skips, or a pass
            with gradients stands in `checkpoint_layers`.

    Source:
        Goyal et al. 2020, arXiv:2001.08950, figure 3; Bolya et al. 2023, arXiv:2210.09461, figure 1.
    """

    def __init__(self, encoder: Encoder, reducers: Sequence[TokenReducer | None]) -> None:
        super().__init__()
        num_layers = len(encoder.body.blocks)
        if len(reducers) != num_layers:
            raise ArgumentError(
                f"reducers must have one entry for each of {num_layers} layers; got {len(reducers)}. "
                "Use None for layers that keep all tokens."
            )
        if encoder.body.skips is not None:
            raise CombinationError("long skips join layers of one length. Build the encoder with skips=None.")
        for block in encoder.body.blocks:
            _op_of(block)
        self.encoder = encoder
        self.reducers = list(reducers)
        self.reducer_modules = nn.ModuleDict({str(i): r for i, r in enumerate(reducers) if isinstance(r, nn.Module)})

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        last = self.trace(tokens, key_mask=key_mask, positions=positions)[-1]
        return last.restore(self.encoder.head(self.encoder.body.norm(last.x)))

    def trace(
        self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tokens, ...]:
        """What is left after each layer, before the final norm and the head."""
        check_tokens(tokens)
        check_key_mask(key_mask, tokens)
        body = self.encoder.body
        if positions is None:
            positions = body.choose_positions(tokens.shape[1], tokens.device)
        current = Tokens.whole(body.embed(tokens, positions), key_mask=key_mask, positions=positions)
        if tokens.shape[1] == 0:  # nothing to attend to, so nothing for a reducer to see
            return (current,) * len(body.blocks)
        layers = []
        for block, reducer in zip(body.blocks, self.reducers, strict=True):
            assert isinstance(block, TransformerBlock)
            current = _layer(block, reducer, current)
            layers.append(current)
        return tuple(layers)


def _op_of(block: nn.Module) -> WatchedAttention:
    ops = [module for module in block.modules() if isinstance(module, WatchedAttention)]
    if len(ops) != 1:
        raise CombinationError(
            f"each layer must attend through one WatchedAttention, so that its reducer sees what tokens received; "
            f"{type(block.mixer).__name__} has {len(ops)}. Build it with op=WatchedAttention()."
        )
    return ops[0]


def _layer(block: TransformerBlock, reducer: TokenReducer | None, tokens: Tokens) -> Tokens:
    if torch.is_grad_enabled() and "forward" in vars(block):
        raise CombinationError(
            "ReducingEncoder runs the parts of its layers, not their `forward`, which checkpoint_layers replaces: "
            "nothing would be recomputed. Leave checkpoint_layers out, or use it on an Encoder."
        )
    attended: Attended | None = None

    def watched(h: Tensor) -> Tensor:
        nonlocal attended
        y, attended = _op_of(block).watch(
            lambda: block.mixer(h, key_mask=tokens.key_mask, positions=tokens.positions),
            key_mask=tokens.key_mask,
            sizes=tokens.sizes,
        )
        return y

    mixed = replace(tokens, x=block.mixer_residual(tokens.x, watched))
    if reducer is not None:
        assert attended is not None
        mixed = reducer(mixed, attended)
    return replace(mixed, x=block.feed_forward_residual(mixed.x, block.feed_forward))
