"""Adam against the update of the paper in float64, with and without an L2 penalty."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.recipe import TrainingRecipe


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.5, 0.999)])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_equals_algorithm_1(l2: float, betas: tuple[float, float]) -> None:
    rate, draws = 0.05, torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    course = TrainingRecipe(adam(rate, l2=l2, betas=betas)).start(model, num_steps=25)
    w = model.weight.detach().clone()
    m = v = torch.zeros_like(w)
    for t in range(1, 26):
        x = torch.randn(4, 3, dtype=torch.float64, generator=draws)
        course.step(model(x).square().sum() / 2)
        g = w @ x.T @ x + l2 * w
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        w = w - rate * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    # float64 rounding of 25 updates, which later gradients, of order 10, hand on
    torch.testing.assert_close(model.weight.detach(), w, atol=1e-11, rtol=0)


def test_the_size_of_the_gradient_does_not_matter_to_the_first_step() -> None:
    """m / sqrt(v) of one gradient is its sign."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    before, slopes = model.weight.detach().clone(), torch.tensor([[1e-3, -1.0, 1e3]], dtype=torch.float64)
    TrainingRecipe(adam(0.01)).start(model, num_steps=1).step((model.weight * slopes).sum())
    # epsilon, 1e-8, is a hundred thousandth of the smallest gradient
    torch.testing.assert_close(before - model.weight.detach(), 0.01 * slopes.sign(), atol=0, rtol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam(math.inf), "learning_rate must be finite; got inf"),
        (lambda: adam(math.nan), "learning_rate must be positive; got nan"),
        (lambda: adamw(0.0), "learning_rate must be positive; got 0.0"),
        (lambda: adam(1e-3, l2=-1.0), "l2 must be a finite number, not negative; got -1.0"),
        (lambda: adamw(1e-3, weight_decay=math.nan), "weight_decay must be a finite number, not negative; got nan"),
        (lambda: adamw(1e-3, betas=(0.9, 1.0)), r"betas must be two numbers from 0 to below 1; got \(0.9, 1.0\)"),
        (lambda: adam(1e-3, betas=(-0.1, 0.9)), "betas must be two numbers from 0 to below 1"),
    ],
)
def test_bad_numbers_are_refused_before_there_is_a_model(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
