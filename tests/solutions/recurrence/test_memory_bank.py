"""MemoryBankAttention against its definition, in chunks of any sizes, and with a state that stops growing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.recurrence.memory_bank import MemoryBank, MemoryBankAttention
from transformer_problems.testing import check_mixer

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS = {
    "none": lambda: None,
    "rotary": lambda: RotaryEmbedding(DIM),
    "alibi": lambda: ALiBi(HEADS),
    "shaw": lambda: ShawRelative(DIM, max_distance=5),
}
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms


def build(segment_len: int, left_context: int, num_memories: int, position: str = "rotary") -> MemoryBankAttention:
    torch.manual_seed(0)
    return MemoryBankAttention(
        WIDTH,
        HEADS,
        segment_len=segment_len,
        left_context=left_context,
        num_memories=num_memories,
        position=POSITIONS[position](),
        bias=True,
    ).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: MemoryBankAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Token by token: the inputs that it sees and the means of those it sees in outline, gathered one by one."""
    size, outputs = layer.segment_len, []
    for b in range(len(x)):
        real = torch.ones(x.shape[1], dtype=torch.bool) if key_mask is None else key_mask[b]
        for t in range(x.shape[1]):
            segment = t // size
            seen, places = [], []
            for s in range(max(0, segment - layer.num_memories), segment):
                inside = [i for i in range(s * size, (s + 1) * size) if real[i]]
                if inside:
                    seen.append(x[b, inside].mean(0))
                    places.append((s + 1) * size - 1)
            for i in range(max(0, segment * size - layer.left_context), t + 1):
                if real[i]:
                    seen.append(x[b, i])
                    places.append(i)
            outputs.append(attend(layer, x[b, t], t, seen, places))
    return torch.stack(outputs).view_as(x)


def attend(layer: MemoryBankAttention, query: Tensor, at: int, seen: list[Tensor], places: list[int]) -> Tensor:
    if not seen:
        return layer.out_proj(torch.zeros_like(query))
    context = torch.stack(seen)
    q, k, v = (
        projection(y).view(-1, HEADS, DIM).transpose(0, 1)
        for projection, y in ((layer.q_proj, query), (layer.k_proj, context), (layer.v_proj, context))
    )
    bias, q_at, k_at = None, torch.tensor([at]), torch.tensor(places)
    if layer.position is not None:
        bias = layer.position.bias(q, q_at, k_at)
        q, k = layer.position.rotate(q, k, q_at, k_at)
    scores = q @ k.mT * DIM**-0.5 + (0.0 if bias is None else bias)
    y: Tensor = layer.out_proj((scores.softmax(-1) @ v).flatten())
    return y


def run_stream(layer: MemoryBankAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, MemoryBank]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("length", "sizes"),
    [(1, (4, 3, 2)), (23, (4, 3, 2)), (16, (4, 6, 9)), (13, (5, 0, 1)), (9, (3, 2, 0)), (7, (9, 9, 9))],
)
def test_equals_the_definition_in_outputs_and_gradients(
    position: str, length: int, sizes: tuple[int, int, int]
) -> None:
    layer = build(*sizes, position)
    x, weight = draw(length).requires_grad_(), draw(length)
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    inputs = (x, *layer.parameters())
    grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*grads, **TOLERANCE)


@pytest.mark.parametrize("position", ["none", "rotary"])
def test_masked_tokens_are_neither_read_nor_averaged(position: str) -> None:
    layer = build(4, 3, 2, position)
    x, mask = draw(19), torch.rand(2, 19) < 0.6
    mask[0, :8] = False  # two segments without a summary
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, mask), **TOLERANCE)


@pytest.mark.parametrize("position", POSITIONS)
def test_keeps_the_contract(position: str) -> None:
    check_mixer(build(5, 3, 2, position), embed_dim=WIDTH)


def test_gradcheck() -> None:
    layer, x = build(2, 1, 2), draw(7, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,))


@settings(max_examples=40)
@given(
    position=st.sampled_from(sorted(POSITIONS)),
    segment_len=st.integers(1, 7),
    left_context=st.integers(0, 9),
    num_memories=st.integers(0, 4),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
)
def test_chunks_of_any_sizes_give_what_the_whole_gives(
    position: str, segment_len: int, left_context: int, num_memories: int, sizes: list[int]
) -> None:
    layer, x = build(segment_len, left_context, num_memories, position), draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)
    assert state.tokens[0].shape[2] < segment_len + left_context
    assert state.summaries[0].shape[2] == min(num_memories, sum(sizes) // segment_len)


def test_streamed_gradients_equal_those_of_the_whole() -> None:
    layer, x, weight = build(4, 3, 2), draw(14).requires_grad_(), draw(14)
    inputs = (x, *layer.parameters())
    whole = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    streamed = torch.autograd.grad((run_stream(layer, x, [1, 1, 5, 7])[0] * weight).sum(), inputs)
    torch.testing.assert_close(streamed, whole, **TOLERANCE)


def test_the_bank_reaches_back_further_than_the_left_context() -> None:
    layer = build(4, 2, 3)
    x = draw(20)
    changed = torch.cat([x[:, :4], draw(1), x[:, 5:]], dim=1)  # token 4: seen by segment 4 in outline only
    assert not torch.allclose(layer(changed)[:, 19], layer(x)[:, 19])
    oldest = torch.cat([draw(1), x[:, 1:]], dim=1)  # token 0: its summary has left the bank
    torch.testing.assert_close(layer(oldest)[:, 16:], layer(x)[:, 16:], **TOLERANCE)


def test_a_streamed_token_costs_and_holds_the_same_after_any_history() -> None:
    layer = build(4, 3, 5)
    costs = []
    with torch.no_grad():
        for length in (25, 81, 401):  # all one token into a segment
            _, state = run_stream(layer, draw(length, 1), [length])
            with FlopCounterMode(display=False) as counter:
                layer.stream(draw(1, 1), state)
            costs.append((counter.get_total_flops(), state.num_bytes))
    assert len(set(costs)) == 1
    assert costs[0][1] == 2 * 8 * WIDTH * (3 + 1 + 5 + 1)  # left context, token, summaries, sum


def test_cost_is_linear_in_length() -> None:
    layer = build(8, 8, 4)

    def flops(length: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(draw(length))
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) == 4 * flops(128)


def test_a_decoder_streams_through_layers_of_memory() -> None:
    model = Decoder(7, WIDTH, 2, lambda: build(4, 3, 2)).double()
    tokens = torch.randint(7, (2, 21))
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 2, 3, 15], dim=1):
            logits, state = model.stream(chunk, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), **TOLERANCE)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="left_context must not be negative; got -1"):
        build(4, -1, 2)
    with pytest.raises(ArgumentError, match="num_memories must not be negative; got -2"):
        build(4, 1, -2)
    with pytest.raises(ArgumentError, match="segment_len must be positive; got 0"):
        build(0, 1, 2)
