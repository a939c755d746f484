"""Continual attention against full attention over the window, recomputed from scratch at every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.attention.continual import (
    ContinualAttention,
    RetroactiveAttention,
    RetroactiveState,
)
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.testing import check_mixer

WIDTH, HEADS, DIM = 12, 3, 4
POSITIONS = {"none": lambda: None, "rotary": lambda: RotaryEmbedding(DIM)}
TOLERANCE = {"atol": 1e-9, "rtol": 0.0}  # sums in float64 that may have lost 20 of their 52 bits, 2^-32 = 2e-10


def build(window_len: int, position: str = "rotary") -> RetroactiveAttention:
    torch.manual_seed(0)
    return RetroactiveAttention(WIDTH, HEADS, window_len=window_len, position=POSITIONS[position](), bias=True).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def run_steps(layer: RetroactiveAttention, x: Tensor) -> tuple[list[Tensor], RetroactiveState]:
    state, outputs = layer.initial_state(len(x)), []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        outputs.append(y)
    return outputs, state


def naive_window(layer: RetroactiveAttention, x: Tensor, end: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the window that ends before `end`, one head at a time."""
    places = torch.arange(max(0, end - layer.window_len), end)
    window, heads = x[:, places], []
    q, k, v = (
        p(window).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if layer.position is not None:
        q, k = layer.position.rotate(q, k, places, places)
    for h in range(HEADS):
        heads.append((q[:, h] @ k[:, h].mT / DIM**0.5).softmax(-1) @ v[:, h])
    y: Tensor = layer.out_proj(torch.cat(heads, dim=-1))
    return y


@settings(max_examples=25)
@given(position=st.sampled_from(sorted(POSITIONS)), window_len=st.integers(2, 9), length=st.integers(1, 30))
def test_retroactive_steps_equal_attention_over_the_window(position: str, window_len: int, length: int) -> None:
    layer, x = build(window_len, position), draw(length)
    with torch.no_grad():
        outputs, state = run_steps(layer, x)
        for t, y in enumerate(outputs, 1):
            torch.testing.assert_close(y, naive_window(layer, x, t), **TOLERANCE)
    assert state.num_seen == length and state.q.shape[2] == min(length, window_len)


def test_forward_is_attention_over_everything() -> None:
    layer, x = build(9), draw(9)
    torch.testing.assert_close(layer(x), naive_window(layer, x, 9), **TOLERANCE)
    torch.testing.assert_close(layer(x), run_steps(layer, x)[0][-1], **TOLERANCE)
    check_mixer(layer, embed_dim=WIDTH)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ruling_key_that_leaves_takes_no_digits_with_it(scale: float, dtype: torch.dtype) -> None:
    """Scores of hundreds and more: exponentials would overflow, or cancel to nothing, without offset and renewal."""
    layer, x = build(5, "none").to(dtype), draw(40).to(dtype)
    x[:, ::7] *= scale
    with torch.no_grad():
        outputs, _ = run_steps(layer, x)
        exact, x_exact = build(5, "none"), x.double()
        for t, y in enumerate(outputs, 1):
            expected = naive_window(exact, x_exact, t)
            # float32 rounds scores of up to a million before their exponential: there only finite, not exact
            if dtype == torch.float64:
                torch.testing.assert_close(y, expected, atol=1e-9 * scale, rtol=0.0)
            elif scale == 1.0:
                torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0.0)
            assert y.isfinite().all()


def test_gradients_equal_those_of_the_window() -> None:
    layer, x = build(4), draw(9).requires_grad_()
    weight = draw(4)
    inputs = (x, *layer.parameters())
    ours = torch.autograd.grad((run_steps(layer, x)[0][-1] * weight).sum(), inputs)
    theirs = torch.autograd.grad((naive_window(layer, x, 9) * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    short = draw(5, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run_steps(layer, x)[0][-1], (short,))


def test_a_step_is_linear_in_the_window_and_independent_of_history() -> None:
    def flops(window_len: int, length: int, *, recompute: bool = False) -> int:
        layer, x = build(window_len), draw(length)
        with torch.no_grad():
            _, state = run_steps(layer, x)
            with FlopCounterMode(display=False) as counter:
                if recompute:
                    layer(x[:, -window_len:])
                else:
                    layer.step(x[:, :1], state)
        return counter.get_total_flops()

    assert flops(32, 40) == flops(32, 90)
    new_token = 3 * 2 * 2 * WIDTH * WIDTH  # query, key and value of one token in each of two rows
    assert flops(64, 70) - new_token < 2.1 * (flops(32, 70) - new_token)
    assert flops(64, 70) < flops(64, 70, recompute=True) / 4


def test_states_stay_valid_and_stop_growing() -> None:
    layer = build(5)
    with torch.no_grad():
        _, state = run_steps(layer, draw(7))
        one, other = draw(1), draw(1)
        before, after_one = layer.step(one, state)
        layer.step(other, state)
        assert torch.equal(layer.step(one, state)[0], before)
    assert after_one.num_bytes == state.num_bytes == 8 * 2 * 5 * (4 * WIDTH + 3 * HEADS)
    assert state.detach().num_seen == 7


@pytest.mark.parametrize("window_len", [2, 6])
def test_single_output_form_keeps_the_contract(window_len: int) -> None:
    check_mixer(ContinualAttention(WIDTH, HEADS, window_len=window_len, position=ALiBi(HEADS)), embed_dim=WIDTH)


@settings(max_examples=30)
@given(window_len=st.integers(2, 9), sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6))
def test_single_outputs_are_the_newest_of_the_retroactive_ones(window_len: int, sizes: list[int]) -> None:
    retroactive = build(window_len)
    layer = ContinualAttention(WIDTH, HEADS, window_len=window_len, position=RotaryEmbedding(DIM), bias=True).double()
    layer.attention.load_state_dict(retroactive.state_dict())
    x = draw(sum(sizes))
    with torch.no_grad():
        outputs, _ = run_steps(retroactive, x)
        expected = torch.cat([y[:, -1:] for y in outputs], dim=1)
        torch.testing.assert_close(layer(x), expected, **TOLERANCE)
        state, streamed = layer.initial_state(2), []
        for chunk in x.split(sizes, dim=1):
            y, state = layer.stream(chunk, state)
            streamed.append(y)
        torch.testing.assert_close(torch.cat(streamed, dim=1), expected, **TOLERANCE)


def test_a_streamed_token_costs_and_holds_the_same_after_any_history() -> None:
    layer = ContinualAttention(WIDTH, HEADS, window_len=9).double()
    costs = set()
    with torch.no_grad():
        for length in (8, 50, 400):
            _, state = layer.stream(draw(length), layer.initial_state(2))
            with FlopCounterMode(display=False) as counter:
                layer.stream(draw(1), state)
            costs.add((counter.get_total_flops(), state.num_bytes))
    assert len(costs) == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="window_len must be at least 2; got 1"):
        ContinualAttention(WIDTH, HEADS, window_len=1)
    with pytest.raises(ArgumentError, match="window_len must be a positive whole number; got 5.5"):
        RetroactiveAttention(WIDTH, HEADS, window_len=5.5)  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="ALiBi adds a bias to the scores"):
        RetroactiveAttention(WIDTH, HEADS, window_len=4, position=ALiBi(HEADS))
    layer = build(4)
    with pytest.raises(ArgumentError, match="x must be one token, .*; got 2 tokens"):
        layer.step(draw(2), layer.initial_state(2))
    with pytest.raises(ArgumentError, match=r"x must be \[B, N, 12\]; got \[2, 12\]"):
        layer.step(draw(1)[:, 0], layer.initial_state(2))
    with pytest.raises(ArgumentError, match="a chunk must have the batch size of its state, 3; got 2"):
        layer.step(draw(1), layer.initial_state(3))
    with pytest.raises(ArgumentError, match="batch_size must not be negative; got -1"):
        layer.initial_state(-1)
    for state in (None, ContinualAttention(WIDTH, HEADS, window_len=4).initial_state(2)):
        with pytest.raises(ArgumentError, match="state must come from initial_state or an earlier step; got"):
            layer.step(draw(1), state)  # type: ignore[arg-type]
