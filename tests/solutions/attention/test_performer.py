"""Performer: the formula of its features, their statistics, causality and streaming, and hostile inputs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionBias
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.performer import Performer, PerformerState, orthogonal_directions
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding

HEADS, DIM, FEATURES = 4, 8, 20


def build(**arguments: int) -> Performer:
    return Performer(DIM, **{"num_features": FEATURES, "chunk_size": 16, **arguments})


def draw(num_queries: int, num_keys: int, *, groups: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(2, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    return heads(HEADS, num_queries), heads(groups, num_keys), heads(groups, num_keys)


def features(x: Tensor, directions: Tensor) -> Tensor:
    """exp(w x - |x|^2 / 2) / sqrt(m), as in the paper, without any stabiliser."""
    x = x / DIM**0.25
    return (x @ directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2).exp() / len(directions) ** 0.5


def naive(op: Performer, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    weights = features(q, op.directions) @ features(k, op.directions).mT
    if allowed is not None:
        weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total) @ v


def check_close(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    # float64 sums of about a hundred terms of order one
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(ours_grads, expected_grads, atol=1e-11, rtol=0)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(length: int, groups: int) -> None:
    op, (q, k, v) = build(), draw(length, length, groups=groups)
    check_close(op(q, k, v), naive(op, q, k, v), (q, k, v))
    causal = torch.ones(length, length).tril()
    check_close(op(q, k, v, is_causal=True), naive(op, q, k, v, causal), (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 64), (7, 50), (40, 50), (50, 7)])
def test_other_queries_than_keys(num_queries: int, num_keys: int, is_causal: bool) -> None:
    op, (q, k, v) = build(), draw(num_queries, num_keys)
    allowed = torch.ones(num_queries, num_keys).tril(num_keys - num_queries) if is_causal else None
    check_close(op(q, k, v, is_causal=is_causal), naive(op, q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_keys_are_not_seen(is_causal: bool) -> None:
    op, (q, k, v) = build(), draw(50, 50)
    mask = torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0, ..., :20] = False  # with causality, rows without a key, a whole chunk of them
    allowed = mask & torch.ones(50, 50, dtype=torch.bool).tril() if is_causal else mask.expand(2, 1, 50, 50)
    y = op(q, k, v, mask=mask, is_causal=is_causal)
    check_close(y, naive(op, q, k, v, allowed), (q, k, v))
    assert not is_causal or (y[0, :, :20] == 0).all()
    assert (op(q, k, v, mask=torch.zeros_like(mask), is_causal=is_causal) == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal: bool) -> None:
    op = build(chunk_size=3)
    inputs = tuple(x[:1, :2, :5].detach().requires_grad_() for x in draw(5, 5))
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, is_causal=is_causal), inputs)


def kernel_estimates(num_features: int, num_draws: int, q: Tensor, k: Tensor) -> Tensor:
    """Estimates of exp(q k / sqrt(D)) by independent draws, [num_draws]."""
    draws = (orthogonal_directions(num_features, DIM, seed=seed) for seed in range(num_draws))
    return torch.stack([features(q, directions) @ features(k, directions) for directions in draws])


def pair() -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, DIM, dtype=torch.float64, generator=generator)
    return q, k, math.exp(float(q @ k) / DIM**0.5)


@pytest.mark.parametrize("num_features", [DIM, 3 * DIM + 5])
def test_estimate_of_the_kernel_is_unbiased(num_features: int) -> None:
    q, k, exact = pair()
    estimates = kernel_estimates(num_features, 4000, q, k)
    standard_error = estimates.std().item() / len(estimates) ** 0.5
    assert standard_error < 0.05 * exact  # the test sees a bias of a few percent
    assert abs(estimates.mean().item() - exact) < 4 * standard_error


def test_error_of_the_kernel_falls_as_one_over_sqrt_m() -> None:
    q, k, exact = pair()
    sizes = [DIM << i for i in range(8)]  # whole blocks, so that draws of blocks are independent
    errors = [(kernel_estimates(m, 300, q, k) - exact).square().mean().sqrt().item() for m in sizes]
    octaves = torch.arange(len(sizes), dtype=torch.float64)
    logs = torch.tensor(errors, dtype=torch.float64).log2()
    slope = ((octaves - octaves.mean()) @ (logs - logs.mean()) / (octaves - octaves.mean()).square().sum()).item()
    # each error is known to 4% (300 draws), heavier-tailed at small m, so the slope to a few hundredths
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_attention_comes_closer_to_softmax_with_more_features() -> None:
    q, k, v = (x.detach() for x in draw(64, 64))
    q, k = q / 2, k / 2  # at larger norms the features are so skewed that the law begins at more features
    exact = DenseAttention()(q, k, v, is_causal=True)

    def error(num_features: int) -> float:
        ops = [build(num_features=num_features, seed=seed) for seed in range(8)]
        return sum((op(q, k, v, is_causal=True) - exact).square().mean().sqrt().item() for op in ops) / len(ops)

    errors = [error(m) for m in (32, 512, 8192)]
    assert errors[2] < 0.1
    for few, many in pairwise(errors):
        assert 2.5 < few / many < 6  # 16 times the features, a quarter of the error


def test_directions_are_orthogonal_within_blocks_and_as_long_as_gaussian_vectors() -> None:
    directions = orthogonal_directions(5 * DIM + 3, DIM, seed=0)
    assert directions.shape == (5 * DIM + 3, DIM)
    for block in directions.split(DIM):
        unit = block / block.norm(dim=-1, keepdim=True)
        # QR in float32, a step of 2^-23, over eight terms
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)), atol=1e-6, rtol=0)
    squares = orthogonal_directions(4096, DIM, seed=0).square().sum(-1)
    # chi-squared with D degrees: mean D, variance 2 D; 4,096 of them give the mean to 1.5%, the variance to 5%
    assert squares.mean().item() == pytest.approx(DIM, rel=0.06)
    assert squares.var().item() == pytest.approx(2 * DIM, rel=0.2)


def test_directions_are_uniform() -> None:
    """Without the sign correction of QR the first column of each rotation would lean to one side."""
    directions = orthogonal_directions(DIM * 2000, DIM, seed=0).view(2000, DIM, DIM)
    # 2,000 values of variance one: a standard error of 0.022; the largest of 64 stays within five
    assert directions.mean(0).abs().max().item() < 0.12


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), groups=st.sampled_from([1, 2, 4]))
def test_streamed_chunks_equal_the_whole(sizes: list[int], groups: int) -> None:
    op, (q, k, v) = build(), draw(sum(sizes), sum(sizes), groups=groups)
    state, parts = op.initial_state(2), []
    for chunk in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        y, state = op.stream(*chunk, state)
        parts.append(y)
    assert state.num_seen == sum(sizes)
    # the same float64 sums in another order
    torch.testing.assert_close(torch.cat(parts, 2), op(q, k, v, is_causal=True), atol=1e-12, rtol=0)


def test_state_stays_valid_and_its_size_does_not_grow() -> None:
    op, (q, k, v) = build(), draw(60, 60, groups=2)
    empty = op.initial_state(2)
    assert (empty.num_seen, empty.num_bytes, empty.tensors(), empty.detach()) == (0, 0, {}, empty)
    _, prefix = op.stream(q[:, :, :20], k[:, :, :20], v[:, :, :20], empty)
    held = {name: tensor.clone() for name, tensor in prefix.tensors().items()}
    rest = tuple(x[:, :, 20:] for x in (q, k, v))
    first, longer = op.stream(*rest, prefix)
    op.stream(*(2 * x for x in rest), prefix)
    again, _ = op.stream(*rest, prefix)
    assert torch.equal(first, again)
    assert all(torch.equal(held[name], tensor) for name, tensor in prefix.tensors().items())
    assert longer.num_bytes == prefix.num_bytes == 8 * 2 * 2 * (FEATURES * (DIM + 1) + 1)  # 2 rows, 2 heads, float64


def test_gradients_flow_through_the_state_until_it_is_detached() -> None:
    op, (q, k, v) = build(), draw(40, 40)

    def halves(state_of: object) -> tuple[Tensor | None, ...]:
        _, state = op.stream(q[:, :, :25], k[:, :, :25], v[:, :, :25], PerformerState())
        y, _ = op.stream(q[:, :, 25:], k[:, :, 25:], v[:, :, 25:], state.detach() if state_of == "cut" else state)
        return torch.autograd.grad(y.square().sum(), (k, v))

    whole = torch.autograd.grad(op(q, k, v, is_causal=True)[:, :, 25:].square().sum(), (k, v))
    # float64 sums of some hundred terms of order one
    torch.testing.assert_close(halves("whole"), whole, atol=1e-11, rtol=0)
    assert all((g[:, :, :25] == 0).all() for g in halves("cut"))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 10.0, 100.0])
def test_vectors_of_any_norm_give_averages_of_the_values(scale: float, is_causal: bool) -> None:
    """Float32 features of such norms overflow and underflow; the quotient must not."""
    op, (q, k, v) = build(), (x.detach().float() for x in draw(50, 50))
    q, k = q * scale, k * scale
    y = op(q, k, v, is_causal=is_causal)
    assert y.isfinite().all()
    # an average with weights that sum to one, each product rounded to 2^-24
    assert y.amax() <= v.amax() + 1e-5 and y.amin() >= v.amin() - 1e-5
    if is_causal:
        torch.testing.assert_close(y[:, :, 0], v[:, :, 0], atol=1e-5, rtol=0)  # it sees itself only


def test_a_later_key_of_far_larger_features_changes_nothing_before_it() -> None:
    op, (q, k, v) = build(), (x.detach().float() for x in draw(32, 32))
    q, k = -k, k * 30  # every query opposes its own key
    calm = k.clone()
    calm[:, :, 8:] = 0.0  # |k| = 0 has features e^(|k|^2 / 2) times those of the keys before it
    before, after = op(q, k, v, is_causal=True), op(q, calm, v, is_causal=True)
    torch.testing.assert_close(after[:, :, :8], before[:, :, :8], atol=1e-5, rtol=0)  # float32 rounding
    assert after.isfinite().all()


def test_bfloat16() -> None:
    op, (q, k, v) = build(), (x.detach() for x in draw(64, 64))
    for is_causal in (False, True):
        half = op(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=is_causal)
        assert half.dtype == torch.bfloat16
        # features are float32; inputs lose 2^-9 of w q of up to 10, so weights move by 2^-6 at most
        torch.testing.assert_close(half.double(), op(q, k, v, is_causal=is_causal), atol=2**-4, rtol=0)


def test_directions_come_back_with_the_state_dict() -> None:
    q, k, v = draw(20, 20)
    saved = build(seed=1)
    loaded = build(seed=2)
    assert not torch.equal(saved(q, k, v), loaded(q, k, v))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(q, k, v), loaded(q, k, v))


def test_redraw() -> None:
    op = build(seed=0)
    before = op.directions.clone()
    op.redraw(seed=5)
    assert not torch.equal(op.directions, before)
    assert torch.equal(op.directions, build(seed=5).directions)
    op.redraw(seed=0)
    assert torch.equal(op.directions, before)


def test_default_number_of_features() -> None:
    assert Performer(64).num_features == round(64 * math.log(64)) == 266
    assert Performer(1).num_features == 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_peak_memory_grows_linearly(is_causal: bool) -> None:
    def peak(op: nn.Module, length: int) -> int:
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, HEADS, length, DIM).unbind())
        return peak_memory_bytes(lambda: op(q, k, v, is_causal=is_causal).sum().backward(), device="cpu")

    assert peak(build(), 512) < 2.1 * peak(build(), 256)
    assert peak(DenseAttention(), 512) > 3.5 * peak(DenseAttention(), 256)  # the meter sees what grows as N^2


def test_self_attention_streams_with_it() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(32, HEADS, num_kv_heads=2, op=build(), position=RotaryEmbedding(DIM)).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    state, parts = layer.initial_state(2), []
    for chunk in x.split([1, 20, 3, 26], dim=1):
        y, state = layer.stream(chunk, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-12, rtol=0)  # float64 sums in another order


def test_wrong_arguments_are_refused() -> None:
    q, k, v = draw(5, 5)
    with pytest.raises(ArgumentError, match=r"bias must be None for Performer.*ALiBi"):
        build()(q, k, v, bias=PositionBias(ALiBi(HEADS), q, torch.arange(5), torch.arange(5)))
    with pytest.raises(ArgumentError, match="mask must be a key mask"):
        build()(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="head_dim must equal the last dimension of q; got 16 and 8"):
        Performer(16)(q, k, v)
    with pytest.raises(ArgumentError, match="num_heads must be a multiple of num_kv_heads; got 4 and 3"):
        build()(q, k[:, :3], v[:, :3])
    with pytest.raises(CombinationError, match="which Performer never forms"):
        SelfAttention(32, HEADS, op=build(), position=ALiBi(HEADS))
    for wrong in ({"head_dim": 0}, {"num_features": 0}, {"chunk_size": 0}):
        with pytest.raises(ArgumentError, match="must be positive; got 0"):
            Performer(**{"head_dim": 8, **wrong})
