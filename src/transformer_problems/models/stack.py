"""Token embedding, a stack of layers and a final norm: the body that decoder and encoder share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.fit import check_built_for, check_makes_layers, check_mixer_fit, check_skips_fit
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.inputs import check_tokens
from transformer_problems.core.slots import LongSkips, PositionEncoding, TokenMixer, token_positions
from transformer_problems.models.block import ResidualFactory, TransformerBlock
from transformer_problems.solutions.normalization.pre_norm import PreNorm

MixerFactory = Callable[[], TokenMixer]


class PositionSampler(Protocol):
    """Chooses the positions of a sequence when the caller gives none; output [N], increasing."""

    def __call__(self, num_tokens: int, device: torch.device, *, training: bool) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StackState:
    """One state a layer, and how many tokens they have seen."""

    layers: tuple[Any, ...]
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        return {f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.tensors().items()}

    def detach(self) -> Self:
        return type(self)(tuple(layer.detach() for layer in self.layers), self.num_seen)


class TransformerLayers(nn.ModuleList):
    """Layers that run one after the other, or with long skips between them.

    Shape:
        x: [B, N, C]; key_mask: [B, N] bool; positions: [N] or [B, N]; output: [B, N, C].
    """

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None, positions: Tensor, skips: LongSkips | None = None
    ) -> Tensor:
        history = [x]
        for block in self:
            x = block(x if skips is None else skips(history), key_mask=key_mask, positions=positions)
            if skips is not None:
                history.append(x)
        return x

    def initial_state(self, batch_size: int) -> StackState:
        """The state before the first token: whatever each layer's mixer needs."""
        return StackState(tuple(block.initial_state(batch_size) for block in self._blocks()))

    def stream(self, x: Tensor, state: StackState, *, skips: LongSkips | None = None) -> tuple[Tensor, StackState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        history, states = [x], []
        for block, block_state in zip(self._blocks(), state.layers, strict=True):
            x, block_state = block.stream(x if skips is None else skips(history), block_state)
            states.append(block_state)
            if skips is not None:
                history.append(x)
        return x, StackState(tuple(states), state.num_seen + x.shape[1])

    def _blocks(self) -> Iterable[TransformerBlock]:
        return cast("Iterable[TransformerBlock]", self)


class TransformerStack(nn.Module):
    """Embeds tokens, adds positions where the encoding does so, and runs the layers.

    Args:
        vocab_size: V.
        embed_dim: C.
        num_layers: L.
        mixer: Called once a layer; returns that layer's token mixer, of width C.
        is_causal: What every mixer must be.
        position: An encoding that adds to the embeddings (sinusoidal, learned). Default none.
        sample_positions: Chooses positions other than 0, 1, 2, ... (randomized positions). Default none.
        residual: Makes what joins each sublayer to its input. Default PreNorm.
        skips: Leads from early layers to late ones. Default none.

    Shape:
        tokens: [B, N] int; key_mask: [B, N] bool; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        CombinationError: If a mixer's causality or width, the residual or the position encoding does not fit.
        ArgumentError: If a size is not positive, `mixer` or `residual` is a part in place of what makes one, or an
            input's shape or dtype is wrong.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        mixer: MixerFactory,
        *,
        is_causal: bool,
        position: PositionEncoding | None = None,
        sample_positions: PositionSampler | None = None,
        residual: ResidualFactory = PreNorm,
        skips: LongSkips | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(vocab_size=vocab_size, embed_dim=embed_dim)
        check_built_for(position, embed_dim=embed_dim)
        if position is not None and not position.embeds:
            name = type(position).__name__
            raise CombinationError(
                f"{name} acts inside attention, not on the embeddings. Pass it to the mixer instead: "
                f"SelfAttention(..., position={name}(...))."
            )
        self.embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=embed_dim**-0.5)
        self.position = position
        self.sample_positions = sample_positions
        self.blocks = stack_layers(
            embed_dim, num_layers, mixer, is_causal=is_causal, residual=residual, device=device, dtype=dtype
        )
        check_skips_fit(skips, num_layers=num_layers, embed_dim=embed_dim)
        self.skips = skips
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_tokens(tokens)
        check_key_mask(key_mask, tokens)
        if positions is None:
            positions = self.choose_positions(tokens.shape[1], tokens.device)
        x = self.blocks(self.embed(tokens, positions), key_mask=key_mask, positions=positions, skips=self.skips)
        y: Tensor = self.norm(x)
        return y

    def initial_state(self, batch_size: int) -> StackState:
        if self.sample_positions is not None:
            raise CombinationError(
                "positions sampled for the whole sequence cannot be streamed. Call forward on the whole sequence."
            )
        return self.blocks.initial_state(batch_size)

    def stream(self, tokens: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        check_tokens(tokens)
        check_state(state)
        positions = token_positions(tokens.shape[1], tokens.device, start=state.num_seen)
        x, state = self.blocks.stream(self.embed(tokens, positions), state, skips=self.skips)
        return self.norm(x), state

    def choose_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """The positions of a sequence when the caller gives none, [N]."""
        if self.sample_positions is None:
            return token_positions(num_tokens, device)
        return self.sample_positions(num_tokens, device, training=self.training)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first layer reads, [B, N, C]: of unit variance, while a tied output gives logits of order one."""
        x: Tensor = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return x if self.position is None else self.position.embed(x, positions)


def stack_layers(
    embed_dim: int,
    num_layers: int,
    mixer: MixerFactory,
    *,
    is_causal: bool,
    residual: ResidualFactory = PreNorm,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerLayers:
    """Layers of one width, each with a mixer of its own.

    Raises:
        CombinationError: If a mixer's causality or width, or the residual's number of layers does not fit.
        ArgumentError: If the number is not positive, or `mixer` or `residual` is a part in place of what makes one, or
            cannot be called as such.
    """
    require_positive_int(num_layers=num_layers)
    check_makes_layers("mixer", mixer, "a layer's mixer")
    _check_residual_factory(residual)
    layers = TransformerLayers(
        TransformerBlock(
            embed_dim, _checked(mixer(), embed_dim, is_causal), residual=residual, device=device, dtype=dtype
        )
        for _ in range(num_layers)
    )
    for block in layers:
        check_built_for(block.mixer_residual, num_layers=num_layers)
    return layers


def _check_residual_factory(residual: object) -> None:
    if isinstance(residual, nn.Module) or not callable(residual):
        name = type(residual).__name__
        raise ArgumentError(
            f"residual must be a function that makes what joins a sublayer to its input; got {name} itself. Pass e.g. "
            "residual=PreNorm."
        )
    try:
        signature(residual).bind(1, device=None, dtype=None)
    except TypeError as error:
        name = getattr(residual, "__name__", type(residual).__name__)
        raise ArgumentError(
            f"residual must be callable as residual(embed_dim, device=..., dtype=...); {name} is not: {error}. Give "
            "what is missing with functools.partial, e.g. partial(DeepNorm, num_layers=12)."
        ) from error


def _checked(mixer: TokenMixer, embed_dim: int, is_causal: bool) -> TokenMixer:
    check_mixer_fit(mixer, embed_dim=embed_dim)
    if mixer.is_causal != is_causal:
        raise CombinationError(
            f"this model needs mixers with is_causal={is_causal}; {type(mixer).__name__} has "
            f"is_causal={mixer.is_causal}. Build it with is_causal={is_causal}."
        )
    return mixer


def check_state(state: StackState) -> None:
    """Refuse what is no state of a stack, such as a None in its place.

    Raises:
        ArgumentError: Unless it is one.
    """
    if not isinstance(state, StackState):
        raise ArgumentError(f"state must come from initial_state or an earlier stream; got {state!r}.")
