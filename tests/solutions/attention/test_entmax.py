"""Entmax against a bisection of its definition, its Jacobian, and attention with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.entmax import EntmaxAttention, entmax
from transformer_problems.testing import check_attention_op

ALPHAS = [1.5, 2]


def bisected(scores: Tensor, alpha: float) -> Tensor:
    """The definition: lower tau from where no key has weight until the weights sum to one."""
    z = (alpha - 1) * scores
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        above = ((z - tau).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return (z - low).clamp(min=0) ** (1 / (alpha - 1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 101, 1000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])  # all keys in the support, some, few
def test_equals_bisection(alpha: float, length: int, spread: float) -> None:
    scores = spread * torch.randn(3, 5, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # tau is bisected to 2^-80; one step of float64 in z of size 30 is 4e-15
    torch.testing.assert_close(entmax(scores, alpha=alpha), bisected(scores, alpha), atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=150), st.data())
def test_sums_to_one_over_what_is_allowed(alpha: float, row: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(row)
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    weights = entmax(scores, alpha=alpha, allowed=allowed)
    assert (weights >= 0).all()
    assert (weights[~allowed] == 0).all()
    # float32: 150 entries, each rounded by up to 2^-24 of values up to 2
    assert abs(weights.sum().item() - float(allowed.any())) < 150 * 2**-20
    if allowed.any():
        torch.testing.assert_close(weights[allowed], entmax(scores[allowed], alpha=alpha), atol=2**-20, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_is_sparse_and_sparser_with_alpha(alpha: float) -> None:
    scores = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    support = (entmax(scores, alpha=alpha) > 0).sum(-1)
    assert (support < 100).all()
    assert (support >= (entmax(scores, alpha=2) > 0).sum(-1)).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_jacobian(alpha: float) -> None:
    scores = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha=alpha), (scores,))
    allowed = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[2] = False  # a row that may attend to nothing
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha=alpha, allowed=allowed), (scores,))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_equals_autograd_through_the_closed_form(alpha: float) -> None:
    """On a fixed support the threshold is a formula that autograd can differentiate."""
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    z = ((alpha - 1) * scores)[entmax(scores, alpha=alpha) > 0]
    size = len(z)
    if alpha == 2:
        closed = z - (z.sum() - 1) / size
    else:
        closed = (z - (z.mean() - ((1 - size * z.var(unbiased=False)) / size).sqrt())) ** 2
    weight = torch.randn(size, dtype=torch.float64)
    (expected,) = torch.autograd.grad((closed * weight).sum(), scores, retain_graph=True)
    p = entmax(scores, alpha=alpha)
    (mine,) = torch.autograd.grad((p[p > 0] * weight).sum(), scores)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_attention_keeps_the_contract(alpha: float) -> None:
    check_attention_op(EntmaxAttention(alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_distractors_get_exactly_nothing(alpha: float) -> None:
    q = torch.ones(1, 1, 1, 8)
    wanted, noise = torch.full((1, 1, 1, 8), 2.0), torch.zeros(1, 1, 500, 8)
    k, v = torch.cat([wanted, noise], dim=2), torch.cat([torch.ones_like(wanted), noise], dim=2)
    assert (EntmaxAttention(alpha)(q, k, v) == 1).all()


def test_other_alphas_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"alpha must be 1.5 or 2 \(sparsemax\), .*; got 1.3"):
        EntmaxAttention(1.3)
