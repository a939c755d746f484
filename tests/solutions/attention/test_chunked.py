"""Chunked attention against a masked dense softmax, dynamic chunk training, and streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.testing import check_mixer

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS = {
    "none": lambda: None,
    "rotary": lambda: RotaryEmbedding(DIM),
    "alibi": lambda: ALiBi(HEADS),
    "shaw": lambda: ShawRelative(DIM, max_distance=5),
}
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms


def build(chunk_size: int, left_chunks: int, position: str = "none", **options: object) -> ChunkedAttention:
    torch.manual_seed(0)
    return ChunkedAttention(
        WIDTH, HEADS, chunk_size=chunk_size, left_chunks=left_chunks, position=POSITIONS[position](), **options
    ).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: ChunkedAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """All N x N scores, masked by the definition."""
    index = torch.arange(x.shape[1])
    chunk = index // layer.chunk_size
    behind = chunk[:, None] - chunk
    allowed = (behind >= 0) & (behind <= layer.left_chunks)
    if layer.is_causal:
        allowed &= index <= index[:, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    bias = None
    if layer.position is not None:
        bias = layer.position.bias(q, index, index)
        q, k = layer.position.rotate(q, k, index, index)
    scores = q @ k.mT * DIM**-0.5 + (0.0 if bias is None else bias)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    y: Tensor = layer.out_proj((weights @ v).transpose(1, 2).flatten(-2))
    return y


def run_stream(layer: ChunkedAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, KVCache]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("length", "chunk_size", "left_chunks"), [(1, 4, 2), (23, 4, 1), (64, 8, 2), (19, 5, 0), (9, 40, 3)]
)
def test_equals_the_definition_in_outputs_and_gradients(
    length: int, chunk_size: int, left_chunks: int, position: str, look_ahead: bool
) -> None:
    layer = build(chunk_size, left_chunks, position, look_ahead=look_ahead)
    x, weight = draw(length).requires_grad_(), draw(length)
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    inputs = (x, *layer.parameters())
    grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*grads, **TOLERANCE)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_masked_keys_are_not_read(look_ahead: bool) -> None:
    layer = build(4, 1, look_ahead=look_ahead)
    x, mask = draw(19), torch.rand(2, 19) < 0.6
    mask[0, :8] = False  # two chunks with nothing to attend to
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, mask), **TOLERANCE)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_keeps_the_contract(look_ahead: bool) -> None:
    layer = build(6, 2, "rotary", look_ahead=look_ahead)
    report = check_mixer(layer, embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert streamed.outcome == ("not applicable" if look_ahead else "holds")
    assert layer.max_delay == (5 if look_ahead else 0)


def test_gradcheck() -> None:
    layer, x = build(2, 1, "alibi"), draw(5, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,))


@settings(max_examples=40)
@given(
    position=st.sampled_from(sorted(POSITIONS)),
    chunk_size=st.integers(1, 7),
    left_chunks=st.integers(0, 3),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
)
def test_causal_streams_of_any_chunks_give_what_the_whole_gives(
    position: str, chunk_size: int, left_chunks: int, sizes: list[int]
) -> None:
    layer, x = build(chunk_size, left_chunks, position, look_ahead=False), draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    assert len(state) < (left_chunks + 1) * chunk_size


@settings(max_examples=30)
@given(
    chunk_size=st.integers(1, 7),
    left_chunks=st.integers(0, 3),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    rest=st.integers(1, 20),
)
def test_look_ahead_streams_by_whole_chunks(chunk_size: int, left_chunks: int, counts: list[int], rest: int) -> None:
    layer = build(chunk_size, left_chunks, "rotary")
    sizes = [*(count * chunk_size for count in counts), rest]
    x = draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    if rest % chunk_size:
        with pytest.raises(
            ArgumentError, match=f"multiples of chunk_size={chunk_size} until its end; {sum(sizes)} tokens"
        ):
            layer.stream(draw(1), state)


def test_training_draws_chunk_sizes_and_evaluation_does_not() -> None:
    def outputs(seed: int) -> list[Tensor]:
        layer = build(4, 1, dynamic_chunk_sizes=(1, 6))
        torch.manual_seed(seed)
        return [layer(x) for _ in range(12)]

    x = draw(13)
    by_size = [build(size, 1)(x) for size in range(1, 7)]
    drawn = [next(size for size, y in enumerate(by_size, 1) if torch.equal(y, mine)) for mine in outputs(0)]
    assert len(set(drawn)) > 2
    assert all(torch.equal(a, b) for a, b in zip(outputs(0), outputs(0), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(outputs(0), outputs(1), strict=True))
    layer = build(4, 1, dynamic_chunk_sizes=(1, 6)).eval()
    assert all(torch.equal(layer(x), by_size[3]) for _ in range(5))
    layer.chunk_size = 2
    assert torch.equal(layer(x), by_size[1])


def test_cost_is_linear_in_length_and_constant_per_streamed_token() -> None:
    layer = build(8, 2, "rotary", look_ahead=False)

    def flops(call: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops()

    assert flops(lambda: layer(draw(512))) == 2 * flops(lambda: layer(draw(256)))
    costs = set()
    with torch.no_grad():
        for length in (24, 64, 400):  # all at a chunk's start
            _, state = run_stream(layer, draw(length), [length])
            costs.add((flops(lambda held=state: layer.stream(draw(2), held)), state.num_bytes))
    assert len(costs) == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="left_chunks must not be negative; got -1"):
        build(4, -1)
    with pytest.raises(ArgumentError, match=r"dynamic_chunk_sizes must be two positive sizes .* got \(5, 2\)"):
        build(4, 1, dynamic_chunk_sizes=(5, 2))
    for sizes in ((3,), (1, 2, 3), (0, 2)):
        with pytest.raises(ArgumentError, match="dynamic_chunk_sizes must be two positive sizes in ascending order"):
            build(4, 1, dynamic_chunk_sizes=sizes)
    for sizes in ((1, 2.5), ("1", "2"), "12", 5):
        with pytest.raises(ArgumentError, match="^dynamic_chunk_sizes must be a tuple of whole numbers; got "):
            build(4, 1, dynamic_chunk_sizes=sizes)
    dynamic = ScaledRotaryEmbedding(DIM, method="dynamic_ntk", factor=1.0, trained_length=8)
    layer = ChunkedAttention(WIDTH, HEADS, chunk_size=4, left_chunks=1, look_ahead=False, position=dynamic)
    with pytest.raises(CombinationError, match="depends on the final length"):
        layer.initial_state(1)
