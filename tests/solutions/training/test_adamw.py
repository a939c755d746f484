"""AdamW against the update of the paper in float64, and its decay against an L2 penalty."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.recipe import OptimizerFactory, TrainingRecipe
from transformer_problems.solutions.training.warmup import Warmup

STEPS = 25


def follow(optimizer: OptimizerFactory, start: Tensor, gradients: Tensor, schedule: Warmup | None = None) -> Tensor:
    """Where weights end that are given one gradient after the other. start: [n]; gradients: [steps, n]."""
    model = nn.ParameterDict({"w": nn.Parameter(start.clone())})
    recipe = TrainingRecipe(optimizer) if schedule is None else TrainingRecipe(optimizer, schedule=schedule)
    course = recipe.start(model, len(gradients))
    for gradient in gradients:
        course.step((model["w"] * gradient).sum())
    return model["w"].detach()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.5, 0.999)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_algorithm_2(decay: float, betas: tuple[float, float]) -> None:
    rate, schedule, gradients = 0.05, Warmup(5, "linear"), draw(STEPS, 7)
    w = draw(7) + 1
    found = follow(adamw(rate, weight_decay=decay, betas=betas), w, gradients, schedule)
    m = v = torch.zeros(7, dtype=torch.float64)
    for t, g in enumerate(gradients, start=1):
        eta = schedule(t - 1, STEPS)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        # of the paper's eta (alpha u + lambda w), with alpha * decay as its lambda
        w = w - eta * (rate * m_hat / (v_hat.sqrt() + 1e-8) + rate * decay * w)
    # float64 rounding of 25 updates of order 0.05 to weights of order 1
    torch.testing.assert_close(found, w, atol=1e-13, rtol=0)


def test_without_gradients_weights_shrink_by_the_rate_times_the_decay() -> None:
    w = follow(adamw(0.1, weight_decay=0.5), torch.ones(3, dtype=torch.float64), torch.zeros(STEPS, 3))
    torch.testing.assert_close(w, torch.full_like(w, 0.95**STEPS), atol=1e-14, rtol=0)  # 25 float64 roundings


def test_decay_is_the_same_for_all_weights_and_an_l2_penalty_weak_where_gradients_are_large() -> None:
    """Section 2 of the paper. Gradients alternate in sign, of size 0.1 for one weight and of 10 for the other."""
    start, sizes = torch.ones(2, dtype=torch.float64), torch.tensor([0.1, 10.0], dtype=torch.float64)
    gradients = sizes * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)[:, None]
    plain = follow(adam(1e-3), start, gradients)
    decayed = plain - follow(adamw(1e-3, weight_decay=0.01), start, gradients)
    penalised = plain - follow(adam(1e-3, l2=0.01), start, gradients)
    assert decayed.min() > 0
    assert penalised.min() > 0
    # Adam's epsilon, 1e-8, is a ten millionth of the smaller gradient
    torch.testing.assert_close(decayed[0], decayed[1], atol=0, rtol=1e-6)
    # the penalty is divided by the gradient's size; it adds a tenth to the small gradients themselves
    torch.testing.assert_close(penalised[0] / penalised[1], sizes[1] / sizes[0], atol=0, rtol=0.15)


@pytest.mark.parametrize("make", [adam, adamw])
@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan")])
def test_a_rate_that_is_not_positive_is_refused(make, rate: float) -> None:
    with pytest.raises(ArgumentError, match="learning_rate must be positive; got"):
        make(rate)
