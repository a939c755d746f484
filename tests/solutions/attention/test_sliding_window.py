"""SlidingWindow against the definition: dense attention under an explicit N x N mask, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention import sliding_window
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative

HEADS, DIM = 4, 8
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms of size 1


def visible(n: int, m: int, window_size: int, dilations: tuple[int, ...], is_causal: bool) -> Tensor:
    """[H, N, M] by the definition, one pair after the other."""
    rule = torch.zeros(len(dilations), n, m, dtype=torch.bool)
    for head, step in enumerate(dilations):
        for row in range(n):
            for hop in range(-window_size, 1 if is_causal else window_size + 1):
                key = row + m - n + hop * step
                if 0 <= key < m:
                    rule[head, row, key] = True
    return rule


def naive(q: Tensor, k: Tensor, v: Tensor, rule: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax over the allowed keys; a query without any gives zeros. rule: broadcastable to [..., H, N, M]."""
    repeats = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias
    weights = scores.masked_fill(~rule, -1e300).softmax(-1) * rule
    return weights @ v


def draw(n: int, m: int, *, groups: int = HEADS, lead: tuple[int, ...] = (2,)) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(*lead, heads, length, DIM, dtype=torch.float64, requires_grad=True)
        for heads, length in ((HEADS, n), (groups, m), (groups, m))
    )


def assert_same_with_gradients(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, inputs, weight)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 3, (1, 2, 2, 5)])
@pytest.mark.parametrize("n", [1, 63, 64, 100, 101])
def test_equals_the_definition(n: int, dilation: int | tuple[int, ...], is_causal: bool) -> None:
    dilations = (dilation,) * HEADS if isinstance(dilation, int) else dilation
    inputs = draw(n, n, groups=2)
    actual = SlidingWindow(6, dilation=dilation)(*inputs, is_causal=is_causal)
    assert_same_with_gradients(actual, naive(*inputs, visible(n, n, 6, dilations, is_causal)), inputs)


@settings(max_examples=40)
@given(
    n=st.integers(1, 150),
    past=st.integers(0, 90),
    window_size=st.integers(1, 90),
    dilation=st.integers(1, 4),
    is_causal=st.booleans(),
)
def test_equals_the_definition_anywhere(n: int, past: int, window_size: int, dilation: int, is_causal: bool) -> None:
    inputs = draw(n, n + past, lead=())
    rule = visible(n, n + past, window_size, (dilation,), is_causal)
    actual = SlidingWindow(window_size, dilation=dilation)(*inputs, is_causal=is_causal)
    torch.testing.assert_close(actual, naive(*inputs, rule), **TOLERANCE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("encoding", [ALiBi(HEADS), ShawRelative(DIM, max_distance=9).double()], ids=["alibi", "shaw"])
@pytest.mark.parametrize("dilation", [1, (1, 2, 1, 3)])
def test_bias_and_key_mask(
    encoding: PositionEncoding,
    dilation: int | tuple[int, ...],
    is_causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sliding_window, "_SCORES_AT_ONCE", 2**14)  # several chunks even at this length
    monkeypatch.setattr(PositionBias, "dense", None)
    n, m = 133, 150
    inputs = draw(n, m)
    bias = PositionBias(encoding, inputs[0], torch.arange(m - n, m), torch.arange(m))
    full = encoding.bias(inputs[0], bias.q_positions, bias.k_positions)
    keep = torch.rand(2, 1, 1, m) < 0.6
    keep[1, ..., 40:80] = False  # longer than a causal window, so some queries see nothing
    dilations = (dilation,) * HEADS if isinstance(dilation, int) else dilation
    rule = visible(n, m, 9, dilations, is_causal) & keep
    actual = SlidingWindow(9, dilation=dilation)(*inputs, bias=bias, mask=keep, is_causal=is_causal)
    parameters = tuple(encoding.parameters())
    assert_same_with_gradients(actual, naive(*inputs, rule, full), (*inputs, *parameters))


def test_queries_that_see_nothing_give_zeros_and_finite_gradients() -> None:
    inputs = draw(100, 100)
    y = SlidingWindow(3)(*inputs, mask=torch.zeros(2, 1, 1, 100, dtype=torch.bool))
    assert (y == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [3, 70])
def test_gradcheck(length: int, is_causal: bool) -> None:
    inputs = draw(length, length + 2, lead=())
    op = SlidingWindow(2, dilation=(1, 1, 2, 3))
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, is_causal=is_causal), inputs, fast_mode=length > 3)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 23), (torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("masked", [False, True])
def test_other_dtypes(dtype: torch.dtype, bits: int, masked: bool) -> None:
    q, k, v = (x.detach().to(dtype) for x in draw(200, 200))
    mask = torch.rand(2, 1, 1, 200) < 0.7 if masked else None
    actual = SlidingWindow(20)(q, k, v, mask=mask)
    expected = SlidingWindow(20)(q.double(), k.double(), v.double(), mask=mask)
    assert actual.dtype == dtype
    # a handful of roundings of values up to 4: probabilities, their sum, products and the output
    torch.testing.assert_close(actual.double(), expected, atol=16 * 2.0**-bits, rtol=0.0)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_window_over_everything_is_dense(dilation: int) -> None:
    q, k, v = draw(40, 40)
    rule = (torch.arange(40)[:, None] - torch.arange(40)) % dilation == 0
    expected = DenseAttention()(q, k, v, mask=rule, is_causal=True)
    torch.testing.assert_close(SlidingWindow(40, dilation=dilation)(q, k, v, is_causal=True), expected, **TOLERANCE)


def test_the_cache_forgets_what_no_window_sees() -> None:
    layer = SelfAttention(16, 4, op=SlidingWindow(5, dilation=(1, 2, 2, 3)), position=ALiBi(4)).double()
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    with torch.no_grad():
        for chunk in x.split((33, 1, 1, 20, 15), dim=1):
            y, state = layer.stream(chunk, state)
            outputs.append(y)
            assert len(state) <= 15
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x), **TOLERANCE)


def flops(length: int, window_size: int, *, backward: bool = False) -> int:
    q, k, v = (torch.randn(1, 2, length, DIM, requires_grad=backward) for _ in range(3))

    def run() -> None:
        y = SlidingWindow(window_size)(q, k, v)
        if backward:
            y.sum().backward()

    return count_flops(run)


@pytest.mark.parametrize("backward", [False, True])
def test_work_is_linear_in_length_and_near_the_window(backward: bool) -> None:
    base, double = flops(4096, 64, backward=backward), flops(8192, 64, backward=backward)
    assert 1.9 < double / base < 2.1  # the two edges do not grow
    assert flops(4096, 64) < 1.4 * 4 * 2 * DIM * 4096 * (2 * 64 + 1)  # blocks of 32 score 160 keys where 129 would do


def test_refusals() -> None:
    q, k, v = draw(4, 4)
    with pytest.raises(ArgumentError, match="window_size must be positive"):
        SlidingWindow(0)
    with pytest.raises(ArgumentError, match="dilation must be positive"):
        SlidingWindow(4, dilation=(1, 0))
    with pytest.raises(ArgumentError, match="dilation must be positive, or one positive number for each head"):
        SlidingWindow(4, dilation=())
    for dilation, received in ((2.0, "2.0"), ("2", "'2'"), ((1, 1, 1, 1.5), "1.5"), ((1, 1, 1, "2"), "'2'")):
        with pytest.raises(ArgumentError, match=f"^dilation must be a positive whole number; got {received}.$"):
            SlidingWindow(4, dilation=dilation)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="dilation must have one entry"):
        SlidingWindow(4, dilation=(1, 2))(q, k, v)
    with pytest.raises(ArgumentError, match="number of queries"):
        SlidingWindow(4)(q, k[..., :3, :], v[..., :3, :])
    with pytest.raises(ArgumentError, match="key mask"):
        SlidingWindow(4)(q, k, v, mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="num_kv_heads"):
        SlidingWindow(4)(q, k[:, :3], v[:, :3])
