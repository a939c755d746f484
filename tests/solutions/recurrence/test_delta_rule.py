"""The delta rule against its definition step by step, against transformers, and in chunks of any sizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.recurrence.delta_rule import DeltaRule, DeltaState, delta_rule
from transformer_problems.testing import check_mixer

WIDTH, HEADS = 12, 3
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms of order one


def draw(length: int, *, key_dim: int = 4, value_dim: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, beta and gate for a batch of 2 with 3 heads."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, 3, length, key_dim, dtype=dtype, generator=generator) for _ in range(2))
    v = torch.randn(2, 3, length, value_dim, dtype=dtype, generator=generator)
    beta, decay = (torch.rand(2, 3, length, dtype=dtype, generator=generator) for _ in range(2))
    return [q, F.normalize(k, dim=-1), v, beta, -decay]


def naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula as the paper prints it, S of shape [Dv, D]."""
    *lead, length, key_dim = q.shape
    s = q.new_zeros(*lead, v.shape[-1], key_dim) if state is None else state.mT
    outputs = []
    for t in range(length):
        key, value, b = k[..., t, :, None], v[..., t, :, None], beta[..., t, None, None]
        decay = 1.0 if gate is None else gate[..., t, None, None].exp()
        s = decay * s @ (torch.eye(key_dim, dtype=q.dtype) - b * key @ key.mT) + b * value @ key.mT
        outputs.append(s @ q[..., t, :, None])
    return torch.stack(outputs, dim=-3).squeeze(-1), s.mT


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 64), (2, 1), (63, 64), (64, 16), (100, 64), (101, 16)])
def test_equals_the_definition_in_outputs_and_gradients(form: str, gated: bool, length: int, chunk_size: int) -> None:
    inputs = draw(length)[: 5 if gated else 4]
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    gate = inputs[4] if gated else None
    ours = delta_rule(*inputs[:4], gate=gate, initial_state=state, chunk_size=chunk_size, form=form)
    theirs = naive(*inputs[:4], gate, state)
    weights = [torch.randn_like(y) for y in theirs]
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), leaves)
        for ys in (ours, theirs)
    ]
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0.0)  # gradients of order ten


@pytest.mark.peer
@pytest.mark.parametrize("length", [1, 64, 101])
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_agrees_with_transformers(form: str, name: str, length: int) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    inputs = [x.requires_grad_() for x in draw(length, key_dim=8, value_dim=8, dtype=torch.float32)]
    q, k, v, beta, gate = inputs
    state = torch.randn(2, 3, 8, 8)
    ours = delta_rule(q * 8**-0.5, k, v, beta, gate=gate, initial_state=state, form=form)
    peer = getattr(modeling_qwen3_next, name)
    q, k, v, beta, gate = (x.transpose(1, 2) for x in inputs)
    y, last = peer(q, k, v, gate, beta, initial_state=state, output_final_state=True)
    theirs = y.transpose(1, 2), last
    weight = torch.randn_like(ours[0])
    ours_grads, theirs_grads = (torch.autograd.grad((y[0] * weight).sum(), inputs) for y in (ours, theirs))
    tolerance = {"atol": 2e-5, "rtol": 1e-4}  # float32 sums of some hundred terms
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(ours_grads, theirs_grads, **tolerance)


def test_gradcheck() -> None:
    q, k, v, beta, gate = (x[:1, :1].requires_grad_() for x in draw(5, key_dim=2, value_dim=3))
    for size in (2, 5):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b, g, n=size: delta_rule(q, k, v, b, gate=g, chunk_size=n), (q, k, v, beta, gate)
        )
        assert torch.autograd.gradcheck(
            lambda q, k, v, b, n=size: delta_rule(q, k, v, b, chunk_size=n), (q, k, v, beta)
        )


def test_a_value_written_twice_under_one_key_is_replaced() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    v = torch.tensor([[3.0], [5.0], [7.0]])
    y, state = delta_rule(k, k, v, torch.ones(3))
    assert y.flatten().tolist() == [3.0, 5.0, 7.0]
    assert state.flatten().tolist() == [7.0, 5.0]


def test_strong_decay_neither_overflows_nor_spoils_gradients() -> None:
    q, k, v, beta, gate = draw(70)
    gate = (gate * 1000).requires_grad_()
    y, _ = delta_rule(q, k, v, beta, gate=gate)
    torch.testing.assert_close(y, naive(q, k, v, beta, gate)[0], **TOLERANCE)
    (grad,) = torch.autograd.grad(y.sum(), gate)
    assert grad.isfinite().all()


def test_half_precision_keeps_its_memory_in_float32() -> None:
    q, k, v, beta, _ = (x.bfloat16() for x in draw(20))
    y, state = delta_rule(q, k, v, beta)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


def build(**options: object) -> DeltaRule:
    torch.manual_seed(0)
    return DeltaRule(WIDTH, HEADS, **{"chunk_size": 8, **options}).double()


def run_stream(layer: DeltaRule, x: Tensor, sizes: list[int]) -> tuple[Tensor, DeltaState]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"conv_size": 1}], ids=["plain", "gated", "no_convolution"])
def test_keeps_the_contract(options: dict[str, object]) -> None:
    check_mixer(build(**options), embed_dim=WIDTH)


@settings(max_examples=40)
@given(
    gated=st.booleans(),
    conv_size=st.integers(1, 5),
    chunk_size=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
)
def test_chunks_of_any_sizes_give_what_the_whole_gives(
    gated: bool, conv_size: int, chunk_size: int, sizes: list[int]
) -> None:
    layer = build(gated=gated, conv_size=conv_size, chunk_size=chunk_size)
    x = torch.randn(2, sum(sizes), WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(y, layer(x), **TOLERANCE)
    assert state.num_seen == state.detach().num_seen == sum(sizes)


def test_streamed_gradients_equal_those_of_the_whole() -> None:
    layer = build(gated=True)
    x = torch.randn(2, 14, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 14, WIDTH, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    whole = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    streamed = torch.autograd.grad((run_stream(layer, x, [1, 1, 5, 7])[0] * weight).sum(), inputs)
    torch.testing.assert_close(streamed, whole, atol=1e-9, rtol=0.0)  # gradients of hundreds


@pytest.mark.parametrize("gated", [False, True])
def test_masked_tokens_leave_the_memory_untouched(gated: bool) -> None:
    layer = build(gated=gated, conv_size=1)
    x, mask = torch.randn(1, 19, WIDTH, dtype=torch.float64), torch.rand(1, 19) < 0.6
    masked = layer(x, key_mask=mask)
    torch.testing.assert_close(masked[mask][None], layer(x[:, mask[0]]), **TOLERANCE)


def test_left_padding_changes_nothing() -> None:
    layer = build()
    x = torch.randn(1, 15, WIDTH, dtype=torch.float64)
    mask = torch.arange(15)[None] >= 6
    torch.testing.assert_close(layer(x, key_mask=mask)[:, 6:], layer(x[:, 6:]), **TOLERANCE)


def test_a_streamed_token_costs_and_holds_the_same_after_any_history() -> None:
    layer = build()
    costs = []
    with torch.no_grad():
        for length in (1, 50, 400):
            _, state = run_stream(layer, torch.randn(1, length, WIDTH, dtype=torch.float64), [length])
            with FlopCounterMode(display=False) as counter:
                layer.stream(torch.randn(1, 1, WIDTH, dtype=torch.float64), state)
            costs.append((counter.get_total_flops(), state.num_bytes))
    assert len(set(costs)) == 1
    assert costs[0][1] == 8 * (HEADS * 4 * 4 + 3 * 3 * WIDTH)


def test_cost_is_linear_in_length() -> None:
    def flops(length: int) -> int:
        inputs = draw(length)
        with FlopCounterMode(display=False) as counter:
            delta_rule(*inputs[:4], chunk_size=16)
        return counter.get_total_flops()

    assert flops(512) == 2 * flops(256) == 4 * flops(128)


def test_a_decoder_streams_through_layers_of_memory() -> None:
    model = Decoder(7, WIDTH, 2, build).double()
    tokens = torch.randint(7, (2, 21))
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 2, 3, 15], dim=1):
            logits, state = model.stream(chunk, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), **TOLERANCE)


@pytest.mark.parametrize("gated", [False, True])
def test_no_sequences_give_no_output(gated: bool) -> None:
    layer, nothing = DeltaRule(WIDTH, HEADS, gated=gated), torch.randn(0, 21, WIDTH)
    y, state = layer.stream(nothing, layer.initial_state(0))
    z, state = layer.stream(nothing[:, :1], state)
    assert layer(nothing).shape == y.shape == nothing.shape and z.shape == (0, 1, WIDTH)
    assert state.num_bytes == 0


def test_bad_arguments_are_named() -> None:
    inputs = draw(3)[:4]
    with pytest.raises(ArgumentError, match="form must be 'chunked' or 'recurrent'; got 'fast'"):
        delta_rule(*inputs, form="fast")
    with pytest.raises(ArgumentError, match="chunk_size must be positive; got 0"):
        delta_rule(*inputs, chunk_size=0)
    with pytest.raises(ArgumentError, match="conv_size must be positive; got 0"):
        DeltaRule(WIDTH, HEADS, conv_size=0)
