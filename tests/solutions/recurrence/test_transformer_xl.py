"""TransformerXL against its definition, in chunks of any sizes, and at a cost linear in length."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.position.xpos import XPos
from transformer_problems.solutions.recurrence.transformer_xl import SegmentMemory, TransformerXL

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS: dict[str, Callable[[], PositionEncoding | None]] = {
    "none": lambda: None,
    "transformer_xl": lambda: TransformerXLRelative(WIDTH, HEADS),
    "rotary": lambda: RotaryEmbedding(DIM),
    "xpos": lambda: XPos(DIM),
    "alibi": lambda: ALiBi(HEADS),
    "t5": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=12),
    "shaw": lambda: ShawRelative(DIM, max_distance=5),
}
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms


def build(segment_len: int, memory_len: int, position: str = "transformer_xl") -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(
        WIDTH, HEADS, segment_len=segment_len, memory_len=memory_len, position=POSITIONS[position]()
    ).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: TransformerXL, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """All N x N scores twice, with live and with frozen keys, each used where the definition says so."""
    n = x.shape[1]
    index = torch.arange(n)
    start = index[:, None] // layer.segment_len * layer.segment_len
    own = (index >= start) & (index <= index[:, None])
    old = (index < start) & (index >= start - layer.memory_len)
    keys = torch.ones(len(x), 1, 1, n, dtype=torch.bool) if key_mask is None else key_mask[:, None, None, :]
    q = heads(layer.q_proj(x))
    scores = torch.where(own, pair_scores(layer, q, x), pair_scores(layer, q, x.detach()))
    scores = scores.masked_fill(~((own | old) & keys), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    mixed = (weights * own) @ heads(layer.v_proj(x)) + (weights * old) @ heads(layer.v_proj(x.detach()))
    y: Tensor = layer.out_proj(mixed.transpose(1, 2).flatten(-2))
    return y


def pair_scores(layer: TransformerXL, q: Tensor, keys_from: Tensor) -> Tensor:
    k, index, bias = heads(layer.k_proj(keys_from)), torch.arange(q.shape[2]), None
    if layer.position is not None:
        bias = layer.position.bias(q, index, index)
        q, k = layer.position.rotate(q, k, index, index)
    scores = q @ k.mT * DIM**-0.5
    return scores if bias is None else scores + bias


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def run_stream(layer: TransformerXL, x: Tensor, sizes: list[int]) -> tuple[Tensor, SegmentMemory]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("length", "segment_len", "memory_len"), [(1, 4, 4), (23, 4, 4), (23, 5, 12), (16, 8, 3), (9, 4, 100), (12, 4, 0)]
)
def test_equals_the_definition_in_outputs_and_gradients(
    position: str, length: int, segment_len: int, memory_len: int
) -> None:
    layer = build(segment_len, memory_len, position)
    x = draw(length).requires_grad_()
    weight = draw(length)
    ours, theirs = layer(x), naive(layer, x)
    # angles of TransformerXLRelative and rotations are the same numbers in both, so only float64 rounding is left
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    inputs = (x, *layer.parameters())
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs, allow_unused=length == 1)
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), inputs, allow_unused=length == 1)
    for mine, other in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)


@settings(max_examples=60)
@given(
    position=st.sampled_from(sorted(POSITIONS)),
    segment_len=st.integers(1, 9),
    memory_len=st.integers(0, 12),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
)
def test_chunks_of_any_sizes_give_what_the_whole_gives(
    position: str, segment_len: int, memory_len: int, sizes: list[int]
) -> None:
    layer = build(segment_len, memory_len, position)
    x = draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)
    assert state.inputs.shape[1] < segment_len + memory_len


@pytest.mark.parametrize("sizes", [[1] * 14, [5, 9], [14]])
def test_streamed_gradients_stop_at_the_same_places(sizes: list[int]) -> None:
    layer = build(4, 6)
    x = draw(14).requires_grad_()
    weight = draw(14)
    inputs = (x, *layer.parameters())
    whole = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    streamed = torch.autograd.grad((run_stream(layer, x, sizes)[0] * weight).sum(), inputs)
    torch.testing.assert_close(streamed, whole, **TOLERANCE)


def test_memory_is_read_but_passes_no_gradient() -> None:
    layer = build(4, 4)
    x = draw(8).requires_grad_()
    late = layer(x)[:, 4:]
    (grad,) = torch.autograd.grad(late.sum(), x)
    assert (grad[:, :4] == 0).all() and (grad[:, 4:] != 0).any()
    changed = torch.cat([draw(4), x[:, 4:]], dim=1)
    assert not torch.allclose(layer(changed)[:, 4:], late)


def test_nothing_before_the_memory_is_read() -> None:
    layer = build(4, 3)
    x = draw(12)
    changed = torch.cat([draw(5), x[:, 5:]], dim=1)  # the last segment starts at 8 and its memory at 5
    torch.testing.assert_close(layer(changed)[:, 8:], layer(x)[:, 8:], **TOLERANCE)
    assert not torch.allclose(layer(changed)[:, 7], layer(x)[:, 7])


@pytest.mark.parametrize("position", ["none", "transformer_xl", "rotary"])
def test_masked_keys_are_not_read(position: str) -> None:
    layer = build(4, 6, position)
    x, mask = draw(19), torch.rand(2, 19) < 0.6
    mask[0, :6] = False  # a first segment with nothing to attend to
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, mask), **TOLERANCE)


@pytest.mark.parametrize("position", ["none", "transformer_xl", "rotary"])
def test_cost_is_linear_in_length(position: str) -> None:
    layer = build(16, 16, position).float()

    def flops(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, length, WIDTH))
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) == 4 * flops(128)


@pytest.mark.parametrize("position", ["transformer_xl", "rotary"])
def test_given_positions_reach_the_encoding(position: str) -> None:
    layer = build(4, 5, position)
    x = draw(11)
    index = torch.arange(11)
    rows = torch.stack([index, index * 2])
    y = layer(x, positions=rows)
    for row in range(2):
        torch.testing.assert_close(y[row], layer(x[row : row + 1], positions=rows[row])[0], **TOLERANCE)
    torch.testing.assert_close(y[0], layer(x)[0], **TOLERANCE)
    assert not torch.allclose(y[1], layer(x)[1])


def test_a_state_can_be_continued_in_several_ways() -> None:
    layer = build(4, 6)
    prefix, one, other = draw(9), draw(3), draw(3)
    _, state = run_stream(layer, prefix, [9])
    before, _ = layer.stream(one, state)
    layer.stream(other, state)
    after, _ = layer.stream(one, state)
    assert torch.equal(before, after)
    assert state.detach().inputs.grad_fn is None and state.detach().num_seen == 9


def test_state_stops_growing() -> None:
    layer = build(4, 6)
    with torch.no_grad():
        _, short = run_stream(layer, draw(11), [1] * 11)
        _, long = run_stream(layer, draw(51), [17, 17, 17])
    assert short.num_bytes == long.num_bytes == 2 * (6 + 3) * WIDTH * 8  # both stand 3 tokens into a segment
    assert sum(t.numel() * t.element_size() for t in long.tensors().values()) == long.num_bytes


def test_gradcheck_where_no_gradient_is_stopped() -> None:
    whole, cut = build(6, 2), build(2, 0)
    x = draw(6, batch_size=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whole(x), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: cut(x), (x,), fast_mode=True)


def test_a_decoder_streams_through_layers_of_memory() -> None:
    def mixer() -> TransformerXL:
        return TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=4, position=TransformerXLRelative(WIDTH, HEADS))

    model = Decoder(7, WIDTH, 3, mixer).double()
    tokens = torch.randint(7, (2, 21))
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 2, 3, 15], dim=1):
            logits, state = model.stream(chunk, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), **TOLERANCE)


def test_parts_that_do_not_fit_are_refused() -> None:
    class NoBias(DenseAttention):
        accepts_bias = False

    class NoCausality(DenseAttention):
        accepts_causal = False

    with pytest.raises(CombinationError, match="SinusoidalEncoding adds to the embeddings"):
        TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=4, position=SinusoidalEncoding(WIDTH))
    with pytest.raises(CombinationError, match="ALiBi adds a bias to the scores, which NoBias never forms"):
        TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=4, position=ALiBi(HEADS), op=NoBias())
    with pytest.raises(CombinationError, match="NoCausality cannot be causal"):
        TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=4, op=NoCausality())
    with pytest.raises(ArgumentError, match="memory_len must not be negative; got -1"):
        TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=-1)
    dynamic = ScaledRotaryEmbedding(DIM, method="dynamic_ntk", factor=1.0, trained_length=8)
    with pytest.raises(CombinationError, match="ScaledRotaryEmbedding depends on the final length"):
        TransformerXL(WIDTH, HEADS, segment_len=4, memory_len=4, position=dynamic).initial_state(1)
