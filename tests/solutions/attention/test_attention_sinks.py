"""Attention sinks against a masked dense softmax, and streams that keep the sinks and the window only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.testing import check_attention_op, check_mixer

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS = {"none": lambda: None, "rotary": lambda: RotaryEmbedding(DIM), "alibi": lambda: ALiBi(HEADS)}
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms


def naive(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, num_sinks: int, *, is_causal: bool, keep: Tensor | None = None
) -> Tensor:
    n, m = q.shape[-2], k.shape[-2]
    row, column = torch.arange(m - n, m)[:, None], torch.arange(m)
    allowed = ((row - column).abs() <= window_size) | (column < num_sinks)
    if is_causal:
        allowed &= column <= row
    if keep is not None:
        allowed = allowed & keep
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def build(window_size: int, num_sinks: int, position: str = "none") -> SelfAttention:
    torch.manual_seed(0)
    op = AttentionSinks(window_size, num_sinks=num_sinks)
    return SelfAttention(WIDTH, HEADS, op=op, position=POSITIONS[position]()).double()


def run_stream(layer: SelfAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, KVCache]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("length", "window_size", "num_sinks"), [(1, 3, 4), (63, 5, 1), (64, 8, 4), (101, 3, 9), (9, 40, 40)]
)
def test_equals_the_definition_in_outputs_and_gradients(
    length: int, window_size: int, num_sinks: int, masked: bool, is_causal: bool
) -> None:
    q, k, v, weight = (torch.randn(2, HEADS, length, DIM, dtype=torch.float64) for _ in range(4))
    keep = torch.rand(2, 1, 1, length) < 0.6 if masked else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = AttentionSinks(window_size, num_sinks=num_sinks)(q, k, v, mask=keep, is_causal=is_causal)
    theirs = naive(q, k, v, window_size, num_sinks, is_causal=is_causal, keep=keep)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    if not masked:  # an empty row has no gradient in the formula
        grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, **TOLERANCE)


@pytest.mark.parametrize("num_sinks", [1, 4])
def test_keeps_the_contract(num_sinks: int) -> None:
    check_attention_op(AttentionSinks(5, num_sinks=num_sinks))
    check_mixer(build(5, num_sinks, "rotary"), embed_dim=WIDTH)


def test_gradcheck() -> None:
    inputs = [torch.randn(1, 1, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    op = AttentionSinks(2, num_sinks=2)
    for is_causal in (False, True):
        assert torch.autograd.gradcheck(lambda q, k, v, c=is_causal: op(q, k, v, is_causal=c), inputs)


@settings(max_examples=60)
@given(
    position=st.sampled_from(sorted(POSITIONS)),
    window_size=st.integers(1, 7),
    num_sinks=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=8),
    needs_grad=st.booleans(),
)
def test_chunks_of_any_sizes_give_what_the_whole_gives(
    position: str, window_size: int, num_sinks: int, sizes: list[int], needs_grad: bool
) -> None:
    layer, length = build(window_size, num_sinks, position), sum(sizes)
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    with torch.set_grad_enabled(needs_grad):
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    sinks = min(num_sinks, length)
    expected = [*range(sinks), *range(max(sinks, length - window_size), length)]
    assert state.positions.tolist() == expected
    assert len(state) == len(expected) and state.num_seen == length
    _, keys, _ = layer._project(x)
    if layer.position is not None:
        _, keys = layer.position.rotate(keys, keys, torch.arange(length), torch.arange(length))
    torch.testing.assert_close(state.keys, keys[:, :, expected], **TOLERANCE)


@given(
    num_sinks=st.integers(0, 4),
    lookback=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
)
@settings(max_examples=60)
def test_a_cache_holds_the_true_tokens_and_stays_valid(num_sinks: int, lookback: int, sizes: list[int]) -> None:
    """Values are their own positions, so that what is held can be read off; old caches are continued too."""
    cache, older = KVCache.empty(1, lookback=lookback, num_sinks=num_sinks), []
    for size in sizes:
        older.append(cache)
        new = torch.arange(cache.num_seen, cache.num_seen + size, dtype=torch.float64)[None, None, :, None]
        cache = cache.append(new, new).trimmed()
        branch = older[len(older) // 2]
        branch.append(-new - 1, -new - 1)
        for held in (cache, cache.detach(), *older[1:]):
            assert held.keys.flatten().tolist() == held.positions.tolist()
            assert len(held) == min(held.num_seen, num_sinks + lookback)
            assert held.num_bytes == 2 * 8 * len(held)


def test_a_streamed_token_costs_and_holds_the_same_after_any_history() -> None:
    layer = build(8, 4, "rotary")
    costs = []
    with torch.no_grad():
        for length in (12, 50, 400):
            _, state = run_stream(layer, torch.randn(1, length, WIDTH, dtype=torch.float64), [length])
            with FlopCounterMode(display=False) as counter:
                layer.stream(torch.randn(1, 1, WIDTH, dtype=torch.float64), state)
            costs.append((counter.get_total_flops(), state.num_bytes))
    assert len(set(costs)) == 1
    assert costs[0][1] == 2 * 8 * 12 * WIDTH


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="num_sinks must be positive; got 0"):
        AttentionSinks(4, num_sinks=0)
    with pytest.raises(ArgumentError, match="window_size must be positive; got 0"):
        AttentionSinks(0)
