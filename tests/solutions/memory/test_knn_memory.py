"""KNNMemoryAttention against its definition token by token, in chunks of any sizes, at a bounded size."""

import math
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
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.memory.knn_memory import KNNMemoryAttention, NeighborMemory
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.testing import check_mixer

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS: dict[str, Callable[[], PositionEncoding | None]] = {
    "none": lambda: None,
    "rotary": lambda: RotaryEmbedding(DIM),
    "alibi": lambda: ALiBi(HEADS),
    "t5": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=12),
    "shaw": lambda: ShawRelative(DIM, max_distance=5),
}
TOLERANCE = {"atol": 1e-10, "rtol": 0.0}  # float64 sums of some hundred terms


def build(segment_len: int, memory_len: int, num_neighbors: int, position: str = "rotary") -> KNNMemoryAttention:
    torch.manual_seed(0)
    layer = KNNMemoryAttention(
        WIDTH,
        HEADS,
        segment_len=segment_len,
        memory_len=memory_len,
        num_neighbors=num_neighbors,
        position=POSITIONS[position](),
    ).double()
    with torch.no_grad():
        layer.gate.normal_()
        layer.temperature.mul_(1 + torch.rand(HEADS))
    return layer


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: KNNMemoryAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """One query of one head at a time, with a sorted list of the stored keys."""
    batch_size, n, _ = x.shape
    real = torch.ones(batch_size, n, dtype=torch.bool) if key_mask is None else key_mask
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    k = k / k.norm(dim=-1, keepdim=True)
    q = q / q.norm(dim=-1, keepdim=True) * (layer.temperature * math.sqrt(DIM))[:, None, None]
    index, bias, q_turned, k_turned = torch.arange(n), torch.zeros(HEADS, n, n), q, k
    if layer.position is not None:
        given_bias = layer.position.bias(q, index, index)
        bias = bias if given_bias is None else given_bias
        q_turned, k_turned = layer.position.rotate(q, k, index, index)
    bias = bias.expand(batch_size, HEADS, n, n)
    rows = []
    for b in range(batch_size):
        for h in range(HEADS):
            for i in range(n):
                start = i // layer.segment_len * layer.segment_len
                own = [j for j in range(start, i + 1) if real[b, j]]
                mixed = torch.zeros(DIM, dtype=x.dtype)
                if own:
                    scores = q_turned[b, h, i] @ k_turned[b, h, own].T / math.sqrt(DIM) + bias[b, h, i, own]
                    mixed = scores.softmax(-1) @ v[b, h, own]
                past = [j for j in range(max(0, start - layer.memory_len), start) if real[b, j]]
                past.sort(key=lambda j: -float((q[b, h, i] @ k[b, h, j]).detach()))
                past = past[: layer.num_neighbors]
                if past:
                    scores = q[b, h, i] @ k[b, h, past].detach().T / math.sqrt(DIM)
                    gate = layer.gate[h].sigmoid()
                    mixed = (1 - gate) * mixed + gate * (scores.softmax(-1) @ v[b, h, past].detach())
                rows.append(mixed)
    y: Tensor = layer.out_proj(torch.stack(rows).view(batch_size, HEADS, n, DIM).transpose(1, 2).flatten(-2))
    return y


def run_stream(layer: KNNMemoryAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, NeighborMemory]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("length", "sizes"), [(1, (4, 4, 2)), (23, (4, 9, 3)), (23, (5, 100, 100)), (19, (8, 3, 1))])
def test_equals_the_definition_in_outputs_and_gradients(position: str, length: int, sizes: tuple[int, ...]) -> None:
    layer = build(*sizes, position)
    x, weight = draw(length).requires_grad_(), draw(length)
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    inputs = (x, *layer.parameters())
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs, allow_unused=True)
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), inputs, allow_unused=True)
    for mine, other in zip(ours_grads, theirs_grads, strict=True):
        if mine is None or other is None:
            assert length == 1, "the gate and relative positions are idle on one token only"
        else:
            torch.testing.assert_close(mine, other, **TOLERANCE)


@pytest.mark.parametrize("position", ["none", "rotary", "shaw"])
def test_masked_keys_are_neither_read_nor_stored(position: str) -> None:
    layer = build(4, 9, 3, position)
    x, mask = draw(19), torch.rand(2, 19) < 0.5
    mask[0, :8] = False  # two segments with nothing to store
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, mask), **TOLERANCE)


@settings(max_examples=50)
@given(
    position=st.sampled_from(sorted(POSITIONS)),
    segment_len=st.integers(1, 9),
    memory_len=st.integers(1, 14),
    num_neighbors=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
)
def test_chunks_of_any_sizes_give_what_the_whole_gives(
    position: str, segment_len: int, memory_len: int, num_neighbors: int, sizes: list[int]
) -> None:
    layer = build(segment_len, memory_len, num_neighbors, position)
    x = draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)
    assert state.stored[0].shape[2] <= memory_len
    assert state.own[0].shape[2] == sum(sizes) % segment_len


@pytest.mark.parametrize("sizes", [[1] * 14, [5, 9], [14]])
def test_streamed_gradients_stop_at_the_same_places(sizes: list[int]) -> None:
    layer = build(4, 6, 3)
    x, weight = draw(14).requires_grad_(), draw(14)
    inputs = (x, *layer.parameters())
    whole = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    streamed = torch.autograd.grad((run_stream(layer, x, sizes)[0] * weight).sum(), inputs)
    torch.testing.assert_close(streamed, whole, **TOLERANCE)


def test_keeps_the_mixer_contract() -> None:
    for position in (None, RotaryEmbedding(8)):
        torch.manual_seed(0)
        layer = KNNMemoryAttention(32, 4, segment_len=8, memory_len=24, num_neighbors=16, position=position)
        check_mixer(layer, embed_dim=32)


def test_any_op_attends_within_the_segment() -> None:
    torch.manual_seed(0)
    layer = KNNMemoryAttention(32, 4, segment_len=8, memory_len=24, num_neighbors=4).double()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    expected = layer(x)
    layer.op = FlashAttention(backend="tiled", block_size=3)
    torch.testing.assert_close(layer(x), expected, **TOLERANCE)


def test_memory_is_read_but_passes_no_gradient() -> None:
    layer = build(4, 8, 2)
    x = draw(12).requires_grad_()
    late = layer(x)[:, 8:]
    (grad,) = torch.autograd.grad(late.sum(), x)
    assert (grad[:, :8] == 0).all() and (grad[:, 8:] != 0).any()
    assert not torch.allclose(layer(torch.cat([draw(8), x[:, 8:]], dim=1))[:, 8:], late)


def test_a_far_key_that_fits_is_found_among_many() -> None:
    """A value stored 60 segments ago outweighs all others when its key is the query."""
    layer = KNNMemoryAttention(DIM, 1, segment_len=4, memory_len=1000, num_neighbors=1).double()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        torch.nn.init.eye_(projection.weight)
    with torch.no_grad():
        layer.gate.fill_(50.0)  # 1 - sigmoid(50) is 2e-22: the memory alone answers
    x = torch.nn.functional.normalize(draw(244, batch_size=1)[..., :DIM], dim=-1)
    x[0, 243] = x[0, 3]
    torch.testing.assert_close(layer(x)[0, 243], x[0, 3], **TOLERANCE)


def test_a_state_can_be_continued_in_several_ways() -> None:
    layer = build(4, 6, 3)
    prefix, one, other = draw(9), draw(3), draw(3)
    _, state = run_stream(layer, prefix, [9])
    before, _ = layer.stream(one, state)
    layer.stream(other, state)
    after, _ = layer.stream(one, state)
    assert torch.equal(before, after)
    assert state.detach().own[0].grad_fn is None and state.detach().num_seen == 9


def test_state_stops_growing() -> None:
    layer = build(4, 6, 3)
    with torch.no_grad():
        _, short = run_stream(layer, draw(11), [1] * 11)
        _, long = run_stream(layer, draw(51), [17, 17, 17])
    assert short.num_bytes == long.num_bytes == 2 * 2 * (6 + 3) * WIDTH * 8  # both stand 3 tokens into a segment
    assert sum(t.untyped_storage().nbytes() for t in long.tensors().values()) == long.num_bytes


def test_cost_is_linear_in_length_once_the_memory_is_full() -> None:
    layer = build(16, 32, 4).float()

    def flops(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, length, WIDTH))
        return counter.get_total_flops()

    assert flops(256) - flops(192) == flops(192) - flops(128) > 0


def test_saved_for_backward_is_neighbors_not_the_memory() -> None:
    def saved(memory_len: int) -> int:
        layer = build(16, memory_len, 4)
        x, sizes = draw(256), []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return max(sizes)

    assert saved(240) == saved(32)


def test_given_positions_reach_the_encoding() -> None:
    layer = build(4, 5, 2)
    x, index = draw(11), torch.arange(11)
    rows = torch.stack([index, index * 2])
    y = layer(x, positions=rows)
    for row in range(2):
        torch.testing.assert_close(y[row], layer(x[row : row + 1], positions=rows[row])[0], **TOLERANCE)
    assert not torch.allclose(y[1], layer(x)[1])


def test_gradcheck_where_no_gradient_is_stopped() -> None:
    layer = build(6, 2, 2)
    x = draw(6, batch_size=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,), fast_mode=True)
    with torch.no_grad():
        _, state = run_stream(layer, draw(12, batch_size=1), [12])
    tail = draw(5, batch_size=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer.stream(x, state)[0], (tail,), fast_mode=True)


def test_a_decoder_streams_through_layers_of_memory() -> None:
    torch.manual_seed(0)
    model = Decoder(7, WIDTH, 3, lambda: build(4, 8, 2)).double()
    tokens = torch.randint(7, (2, 21))
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 2, 3, 15], dim=1):
            logits, state = model.stream(chunk, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), **TOLERANCE)


def test_parts_that_do_not_fit_are_refused() -> None:
    def make(**changes: object) -> KNNMemoryAttention:
        return KNNMemoryAttention(WIDTH, HEADS, **{"segment_len": 4, "memory_len": 4, **changes})  # type: ignore[arg-type]

    with pytest.raises(CombinationError, match="SinusoidalEncoding adds to the embeddings"):
        make(position=SinusoidalEncoding(WIDTH))
    for name in ("segment_len", "memory_len", "num_neighbors"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            make(**{name: 0})
    dynamic = ScaledRotaryEmbedding(DIM, method="dynamic_ntk", factor=1.0, trained_length=8)
    with pytest.raises(CombinationError, match="ScaledRotaryEmbedding depends on the final length"):
        make(position=dynamic).initial_state(1)
