"""TransformerStack, alone and in Decoder and Encoder: what they refuse, empty sequences, and the state of a stack."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import LongSkips
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.differential import DifferentialAttention
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.longformer import LongformerAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.position.learned import LearnedPositions
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.recurrence.delta_rule import DeltaRule
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.recurrence.memory_bank import MemoryBankAttention
from transformer_problems.solutions.recurrence.transformer_xl import TransformerXL
from transformer_problems.solutions.residual.deep_norm import DeepNorm
from transformer_problems.solutions.residual.dense_skips import DenseSkips
from transformer_problems.solutions.residual.unet_skips import UNetSkips

VOCAB, WIDTH, HEADS = 11, 16, 4
MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "attention": lambda width: SelfAttention(width, HEADS),
    "gated": lambda width: GatedAttention(SelfAttention(width, HEADS)),
    "differential": lambda width: DifferentialAttention(width, HEADS),
    "longformer": lambda width: LongformerAttention(width, HEADS, window_size=3, is_causal=True),
    "chunked": lambda width: ChunkedAttention(width, HEADS, chunk_size=4, left_chunks=1, look_ahead=False),
    "transformer_xl": lambda width: TransformerXL(width, HEADS, segment_len=4, memory_len=4),
    "memory_bank": lambda width: MemoryBankAttention(width, HEADS, segment_len=4, left_context=2, num_memories=2),
    "delta_rule": lambda width: DeltaRule(width, HEADS),
    "mamba": lambda width: Mamba(width, state_dim=4),
}


def build(mixer: str = "attention") -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, WIDTH, 2, lambda: MIXERS[mixer](WIDTH)).double()  # type: ignore[arg-type,return-value]


def draw(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_of_another_width_is_refused(mixer: str) -> None:
    with pytest.raises(CombinationError, match="is built for embed_dim=32, but its place here has embed_dim=16"):
        Decoder(VOCAB, WIDTH, 2, lambda: MIXERS[mixer](2 * WIDTH))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("position", [SinusoidalEncoding(2 * WIDTH), LearnedPositions(10, 2 * WIDTH)])
def test_a_position_encoding_of_another_width_is_refused(position: SinusoidalEncoding | LearnedPositions) -> None:
    with pytest.raises(CombinationError, match="is built for embed_dim=32"):
        Decoder(VOCAB, WIDTH, 2, lambda: SelfAttention(WIDTH, HEADS), position=position)


def test_a_mixer_in_place_of_what_makes_one_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"got the SelfAttention itself.*Pass mixer=lambda: SelfAttention\("):
        Decoder(VOCAB, WIDTH, 2, SelfAttention(WIDTH, HEADS))


def test_misplaced_parts_are_refused() -> None:
    with pytest.raises(CombinationError, match="RotaryEmbedding acts inside attention"):
        Decoder(VOCAB, WIDTH, 2, lambda: SelfAttention(WIDTH, HEADS), position=RotaryEmbedding(4))
    with pytest.raises(CombinationError, match="this model needs mixers with is_causal=False"):
        Encoder(VOCAB, WIDTH, 2, lambda: SelfAttention(WIDTH, HEADS))


@pytest.mark.parametrize("skips", [UNetSkips(WIDTH, 3), DenseSkips(3)])
def test_long_skips_of_another_size_are_refused(skips: LongSkips) -> None:
    with pytest.raises(CombinationError, match="Skips is built for num_layers=3, but its place here has num_layers=4"):
        Decoder(VOCAB, WIDTH, 4, lambda: SelfAttention(WIDTH, HEADS), skips=skips)
    with pytest.raises(CombinationError, match="UNetSkips is built for embed_dim=32"):
        Decoder(VOCAB, WIDTH, 3, lambda: SelfAttention(WIDTH, HEADS), skips=UNetSkips(2 * WIDTH, 3))
    with pytest.raises(CombinationError, match=r"DenseSkips is a class, not an instance\. Pass DenseSkips\("):
        Decoder(VOCAB, WIDTH, 3, lambda: SelfAttention(WIDTH, HEADS), skips=DenseSkips)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (PreNorm(WIDTH), r"residual must be a function .*got PreNorm itself. Pass e.g. residual=PreNorm\."),
        (None, "residual must be a function .*got NoneType itself"),
        (DeepNorm, r"DeepNorm is not: missing a required .*'num_layers'.*partial\(DeepNorm, num_layers=12\)"),
        (lambda width: PreNorm(width), "residual must be callable as residual"),
        (partial(DeepNorm, num_layers=99), "DeepNorm is built for num_layers=99, but its place here has num_layers=4"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(residual: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Decoder(VOCAB, WIDTH, 4, lambda: SelfAttention(WIDTH, HEADS), residual=residual)  # type: ignore[arg-type]


def test_a_mixer_that_a_residual_cannot_adopt_is_refused() -> None:
    with pytest.raises(CombinationError, match="Mamba has 0 and 1 of them"):
        Decoder(VOCAB, WIDTH, 2, lambda: Mamba(WIDTH, state_dim=4), residual=partial(DeepNorm, num_layers=2))


def test_wrong_inputs_are_named() -> None:
    model = build()
    for tokens in (draw(5)[0], draw(5).double()):
        for call in (lambda: model(tokens), lambda: model.stream(tokens, model.initial_state(2))):  # noqa: B023
            with pytest.raises(ArgumentError, match=r"tokens must be whole numbers \[B, N\]; got torch\."):
                call()
    for key_mask in (torch.ones(2, 5), torch.ones(2, 4) > 0):
        with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 5\]"):
            model(draw(5), key_mask=key_mask)
    with pytest.raises(ArgumentError, match="state must come from initial_state or an earlier stream; got None"):
        model.stream(draw(5), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixer", MIXERS)
def test_wrong_batches_are_refused(mixer: str) -> None:
    model = build(mixer)
    for batch_size in (-1, "2"):
        with pytest.raises(ArgumentError, match="batch_size must"):
            model.initial_state(batch_size)  # type: ignore[arg-type]
    for state in (model.initial_state(3), model.stream(draw(5), model.initial_state(2))[1]):
        with pytest.raises(ArgumentError, match="batch size of its state, [23]; got 1"):
            model.stream(draw(5)[:1], state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_empty_sequences_and_chunks(mixer: str) -> None:
    model, tokens = build(mixer), draw(9)
    assert model(tokens[:, :0]).shape == (2, 0, VOCAB)
    state, outputs = model.initial_state(2), []
    for chunk in tokens.split([0, 5, 0, 4], dim=1):
        y, state = model.stream(chunk, state)
        outputs.append(y)
    assert state.num_seen == 9
    # the same float64 sums in another order
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-12, rtol=0)


def test_the_state_of_a_stack_is_a_state() -> None:
    model = build()
    _, state = model.stream(draw(5), model.initial_state(2))
    assert set(state.tensors()) == {f"layers.{i}.{name}" for i in range(2) for name in ("keys", "values")}
    assert state.num_bytes == sum(x.numel() * x.element_size() for x in state.tensors().values())
    assert any(x.requires_grad for x in state.tensors().values())
    detached = state.detach()
    assert not any(x.requires_grad for x in detached.tensors().values())
    assert detached.num_seen == 5
    torch.testing.assert_close(detached.tensors(), {name: x.detach() for name, x in state.tensors().items()})


def test_a_stream_of_inference_mode_goes_on_under_no_grad() -> None:
    model, tokens = build(), draw(6)
    with torch.inference_mode():
        _, state = model.stream(tokens[:, :4], model.initial_state(2))
    with torch.no_grad():
        y, _ = model.stream(tokens[:, 4:], state)
        torch.testing.assert_close(y, model(tokens)[:, 4:], atol=1e-12, rtol=0)  # float64 sums in another order
