"""SparseAttention against the definition: dense attention under an explicit N x N mask, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.sparse import Pattern, SparseAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative

HEADS, DIM = 4, 8
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms of size 1


def sees(i: int, j: int, stride: int, pattern: Pattern, num_summary: int, is_causal: bool) -> bool:
    """Child et al. 2019, section 4.3, with the mirrored pattern where not causal."""
    if is_causal and j > i:
        return False
    if pattern == "strided":
        return abs(i - j) <= stride or (i - j) % stride == 0
    return i // stride == j // stride or j % stride >= stride - num_summary


def visible(n: int, m: int, op: SparseAttention, is_causal: bool) -> Tensor:
    """[N, M]; the queries are the last N of the M tokens."""
    return torch.tensor(
        [[sees(i, j, op.stride, op.pattern, op.num_summary, is_causal) for j in range(m)] for i in range(m - n, m)]
    )


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


OPS = {
    "strided": SparseAttention(8),
    "strided, odd": SparseAttention(7),
    "fixed": SparseAttention(10, pattern="fixed", num_summary=3),
    "fixed, all summary": SparseAttention(8, pattern="fixed"),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("n", [1, 63, 64, 100, 101])
def test_equals_the_definition(n: int, name: str, is_causal: bool) -> None:
    inputs = draw(n, n, groups=2)
    actual = OPS[name](*inputs, is_causal=is_causal)
    assert_same_with_gradients(actual, naive(*inputs, visible(n, n, OPS[name], is_causal)), inputs)


@settings(max_examples=40)
@given(
    n=st.integers(1, 60),
    past=st.integers(0, 60),
    stride=st.integers(1, 70),
    pattern=st.sampled_from(["strided", "fixed"]),
    is_causal=st.booleans(),
)
def test_equals_the_definition_anywhere(n: int, past: int, stride: int, pattern: Pattern, is_causal: bool) -> None:
    inputs = draw(n, n + past, lead=())
    op = SparseAttention(stride, pattern=pattern)
    expected = naive(*inputs, visible(n, n + past, op, is_causal))
    torch.testing.assert_close(op(*inputs, is_causal=is_causal), expected, **TOLERANCE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("encoding", [ALiBi(HEADS), ShawRelative(DIM, max_distance=9).double()], ids=["alibi", "shaw"])
@pytest.mark.parametrize("name", OPS)
def test_bias_and_key_mask(
    name: str, encoding: PositionEncoding, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PositionBias, "dense", None)
    n, m = 53, 71
    inputs = draw(n, m)
    bias = PositionBias(encoding, inputs[0], torch.arange(m - n, m), torch.arange(m))
    full = encoding.bias(inputs[0], bias.q_positions, bias.k_positions)
    keep = torch.rand(2, 1, 1, m) < 0.6
    keep[1, ..., :30] = False  # so that some causal queries see nothing
    actual = OPS[name](*inputs, bias=bias, mask=keep, is_causal=is_causal)
    expected = naive(*inputs, visible(n, m, OPS[name], is_causal) & keep, full)
    assert_same_with_gradients(actual, expected, (*inputs, *encoding.parameters()))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_gradcheck(pattern: Pattern, is_causal: bool) -> None:
    inputs = draw(5, 8, lead=())
    op = SparseAttention(3, pattern=pattern)
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, is_causal=is_causal), inputs)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 23), (torch.bfloat16, 7), (torch.float16, 10)])
@pytest.mark.parametrize("name", OPS)
def test_other_dtypes(name: str, dtype: torch.dtype, bits: int) -> None:
    q, k, v = (x.detach().to(dtype) for x in draw(100, 100))
    actual = OPS[name](q, k, v, is_causal=True)
    expected = OPS[name](q.double(), k.double(), v.double(), is_causal=True)
    assert actual.dtype == dtype
    # a handful of roundings of values up to 4: scaled queries, scores, probabilities, products and the output
    torch.testing.assert_close(actual.double(), expected, atol=32 * 2.0**-bits, rtol=0.0)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_two_layers_reach_every_earlier_token(pattern: Pattern) -> None:
    one = visible(64, 64, SparseAttention(8, pattern=pattern, num_summary=1 if pattern == "fixed" else None), True)
    two = (one.float() @ one.float()) > 0
    assert torch.equal(two, torch.ones(64, 64).tril().bool())


def flops(length: int, stride: int, pattern: Pattern) -> int:
    q, k, v = (torch.randn(1, 1, length, DIM) for _ in range(3))
    return count_flops(lambda: SparseAttention(stride, pattern=pattern)(q, k, v, is_causal=True))


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_work_grows_as_the_power_three_halves(pattern: Pattern) -> None:
    growth = flops(16 * 1024, 128, pattern) / flops(1024, 32, pattern)
    assert growth == pytest.approx(16**1.5, rel=0.01)  # stride = sqrt(N); only padding differs


def test_work_is_far_below_dense() -> None:
    q, k, v = (torch.randn(1, 1, 4096, DIM) for _ in range(3))
    dense = count_flops(lambda: DenseAttention()(q, k, v))
    assert flops(4096, 64, "strided") < dense / 16  # 2 blocks of 64 keys and 64 columns where dense has 4,096 keys


def test_refusals() -> None:
    q, k, v = draw(4, 4)
    with pytest.raises(ArgumentError, match="stride must be positive"):
        SparseAttention(0)
    with pytest.raises(UnknownNameError, match="pattern"):
        SparseAttention(4, pattern="stridden")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_summary belongs"):
        SparseAttention(4, num_summary=2)
    with pytest.raises(ArgumentError, match="num_summary must be from 1 to stride"):
        SparseAttention(4, pattern="fixed", num_summary=5)
    for num_summary in (0, 1.5):
        with pytest.raises(ArgumentError, match=f"num_summary must be .*positive.*; got {num_summary}"):
            SparseAttention(4, pattern="fixed", num_summary=num_summary)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="number of queries"):
        SparseAttention(4)(q, k[..., :3, :], v[..., :3, :])
    with pytest.raises(ArgumentError, match="key mask"):
        SparseAttention(4)(q, k, v, mask=torch.ones(4, 4, dtype=torch.bool))
