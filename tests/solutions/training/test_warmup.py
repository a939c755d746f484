"""Warmup: known values, transformers' schedules where they are the same, and what every schedule keeps to."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.warmup import Decay, Warmup

TOTAL = 97
CLOSE = 1e-14  # a few float64 roundings of numbers of at most 1


def peer(name: str, *args: int, **keywords: float) -> list[float]:
    """The factors of one of transformers' schedules, TOTAL + 1 of them."""
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (factor,) = getattr(optimization, name)(optimizer, *args, **keywords).lr_lambdas
    return [factor(step) for step in range(TOTAL + 1)]


def ours(schedule: Warmup, start: int = 0) -> list[float]:
    return [schedule(step, TOTAL) for step in range(start, start + TOTAL + 1)]


@pytest.mark.peer
def test_without_warmup_linear_and_cosine_are_those_of_transformers() -> None:
    """With warmup they differ: transformers' fall from its end on, these from the first step."""
    linear, cosine = (f"get_{decay}_schedule_with_warmup" for decay in ("linear", "cosine"))
    assert ours(Warmup(0, "linear", floor=0.0)) == pytest.approx(peer(linear, 0, TOTAL), abs=CLOSE)
    assert ours(Warmup(0, "cosine", floor=0.0)) == pytest.approx(peer(cosine, 0, TOTAL), abs=CLOSE)
    with_floor = peer("get_cosine_with_min_lr_schedule_with_warmup", 0, TOTAL, min_lr_rate=0.1)
    assert ours(Warmup(0, "cosine")) == pytest.approx(with_floor, abs=CLOSE)


@pytest.mark.peer
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_inverse_sqrt_and_constant_are_those_of_transformers_a_step_earlier(num_steps: int) -> None:
    """transformers gives the first step a rate of 0, which is spared here."""
    theirs = peer("get_inverse_sqrt_schedule", num_steps)[1:]
    assert ours(Warmup(num_steps, "inverse_sqrt"))[:TOTAL] == pytest.approx(theirs, abs=CLOSE)
    theirs = peer("get_constant_schedule_with_warmup", num_steps)[1:]
    assert ours(Warmup(num_steps, "constant"))[:TOTAL] == pytest.approx(theirs, abs=CLOSE)


def test_inverse_sqrt_is_the_schedule_of_the_original_transformer() -> None:
    """Vaswani et al., equation 3, counts steps from 1; its peak is (d * warmup)^-0.5."""
    dim, warmup = 512, 40
    for step in range(1, 400):
        paper = dim**-0.5 * min(step**-0.5, step * warmup**-1.5)
        factor = Warmup(warmup, "inverse_sqrt")(step - 1, 400)
        assert factor == pytest.approx(paper * (dim * warmup) ** 0.5, rel=CLOSE)


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("cosine", {0: 0.1, 50: 0.6, 100: 0.2, 200: 0.2}),
        ("linear", {0: 0.1, 50: 0.6, 100: 0.2, 200: 0.2}),
        ("inverse_sqrt", {0: 0.1, 9: 1.0, 39: 0.5, 89: 1 / 3}),
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 200: 1.0}),
    ],
)
def test_known_values(decay: Decay, factors: dict[int, float]) -> None:
    schedule = Warmup(10, decay, floor=0.2)
    assert {step: schedule(step, 100) for step in factors} == pytest.approx(factors, abs=CLOSE)


@given(
    st.integers(0, 60),
    st.sampled_from(["cosine", "linear", "inverse_sqrt", "constant"]),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_it_rises_to_at_most_1_and_never_rises_again(warmup: int, decay: Decay, floor: float, total: int) -> None:
    schedule = Warmup(warmup, decay, floor)
    factors = [schedule(step, total) for step in range(total + 5)]
    assert all(0 <= factor <= 1 + CLOSE for factor in factors)
    assert factors[0] == pytest.approx(1 / max(1, warmup), abs=CLOSE)
    falling = factors[max(0, warmup - 1) :]
    assert all(later <= earlier + CLOSE for earlier, later in pairwise(falling))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_steps": -1}, "num_steps must not be negative; got -1"),
        ({"num_steps": 2.5}, "num_steps must be a whole number; got 2.5"),
        ({"num_steps": 3, "decay": "cosin"}, "unknown decay 'cosin'. Nearest: cosine"),
        ({"num_steps": 3, "floor": 1.5}, "floor must be a share from 0 to 1; got 1.5"),
        ({"num_steps": 3, "floor": math.nan}, "floor must be a share from 0 to 1; got nan"),
    ],
)
def test_bad_arguments_are_refused(keywords, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Warmup(**keywords)
