"""A course is the loop one would write by hand, resumes bit by bit, and stops before a step it cannot take back."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, DivergedError
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.clipping import GradientClipping
from transformer_problems.solutions.training.recipe import (
    Clipping,
    TrainingCourse,
    TrainingRecipe,
    all_alike,
    no_clipping,
)
from transformer_problems.solutions.training.warmup import Warmup

STEPS = 12


def build() -> nn.Sequential:
    with seeded(0, "model"):
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, generator=generator(0, "batch", step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class BreakGradient(torch.autograd.Function):
    """The identity, whose backward pass gives NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, float("nan"))


def test_a_course_is_the_plain_loop_in_bits() -> None:
    recipe = TrainingRecipe(adamw(1e-2, weight_decay=0.1), schedule=Warmup(4), clipping=GradientClipping(0.5))
    ours, theirs = build(), build()
    with seeded(0, "dropout"):
        course = recipe.start(ours, STEPS)
        norms = [course.step(loss_of(ours, step)) for step in range(STEPS)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.1)
    with seeded(0, "dropout"):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 * Warmup(4)(step, STEPS)
            optimizer.zero_grad()
            loss_of(theirs, step).backward()
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            optimizer.step()
            assert torch.equal(norms[step], norm)
    assert torch.equal(weights(ours), weights(theirs))


def test_every_group_follows_the_schedule_from_its_own_rate() -> None:
    def groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        first, *_, last = model.children()
        return [
            {"params": list(first.parameters()), "lr": learning_rate / 4},
            {"params": list(last.parameters()), "lr": learning_rate},
        ]

    factors = [0.5, 1.0, 0.25]
    model = build()
    course = TrainingRecipe(adam(8.0, groups=groups), schedule=lambda step, num_steps: factors[step]).start(model, 3)
    for step in range(5):
        # the list ends with the training, so a schedule asked beyond it would raise here
        factor = factors[min(step, 2)]
        assert [group["lr"] for group in course.optimizer.param_groups] == [2 * factor, 8 * factor]
        course.step(loss_of(model, step))


def test_regulators_set_the_model_up_for_each_step() -> None:
    model = build()
    seen: list[tuple[nn.Module, int, int]] = []
    recipe = TrainingRecipe(adam(1e-2), regulators=(lambda *call: seen.append(call),))
    course = recipe.start(model, 2)
    for step in range(2):
        assert seen == [(model, done, 2) for done in range(step + 1)]  # before the step's forward pass
        course.step(loss_of(model, step))


def test_without_clipping_the_gradient_stays_and_its_norm_is_given() -> None:
    model = build()
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = no_clipping(list(model.parameters()))
    assert torch.equal(norm, torch.nn.utils.get_total_norm(before))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert no_clipping([nn.Parameter(torch.ones(2))]) == 0


def test_all_parameters_are_alike_by_default() -> None:
    model = build()
    assert all_alike(model, 1e-3) == [{"params": list(model.parameters())}]


def test_a_course_without_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="num_steps must be positive; got 0"):
        TrainingRecipe(adam(1e-2)).start(build(), 0)


class RandomRate:
    """A regulator that draws: the dropout of each step is itself drawn."""

    def __call__(self, model: nn.Sequential, step: int, num_steps: int) -> None:
        model[1].p = 0.2 + 0.6 * float(torch.rand(()))


def recipe_with_everything(optimizer: Callable[..., Any]) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer(1e-2),
        schedule=Warmup(5),
        clipping=GradientClipping(0.5),
        regulators=(lambda model, *_: model.train(),),
    )


def run(course: TrainingCourse, steps: range) -> list[Tensor]:
    return [course.step(loss_of(course.model, step)) for step in steps]


@pytest.mark.parametrize("optimizer", [adam, adamw])
@pytest.mark.parametrize("saved_at", [0, 1, 3, 7, STEPS, STEPS + 2])
def test_a_saved_course_goes_on_bit_by_bit(saved_at: int, optimizer: Callable[..., Any], tmp_path: Path) -> None:
    """Through a file, with dropout, in the middle of the warmup and beyond the schedule's end."""
    recipe, end, path = recipe_with_everything(optimizer), STEPS + 4, tmp_path / "course.pt"
    straight = build()
    with seeded(1, "dropout"):
        course = recipe.start(straight, STEPS)
        run(course, range(saved_at))
        torch.save({"model": straight.state_dict(), "course": course.state_dict()}, path)
        expected = run(course, range(saved_at, end))
    resumed = build()
    with seeded(2, "of another process"):
        course = recipe.start(resumed, STEPS)
        state = torch.load(path, weights_only=True)
        resumed.load_state_dict(state["model"])
        course.load_state_dict(state["course"])
        found = run(course, range(saved_at, end))
    assert course.num_done == end
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(weights(resumed), weights(straight))


def test_a_regulator_that_draws_does_not_shift_the_draws_after_it() -> None:
    recipe = TrainingRecipe(adam(1e-2), regulators=(RandomRate(),))
    model = build()
    with seeded(1, "dropout"):
        course = recipe.start(model, STEPS)
        run(course, range(3))
        state, rate = copy.deepcopy(course.state_dict()), model[1].p
        before = torch.rand(4)
        course.load_state_dict(state)
        model[1].p = rate
        assert torch.equal(torch.rand(4), before)


def test_loading_sets_the_model_up_for_the_step_it_is_at() -> None:
    seen: list[int] = []
    recipe = TrainingRecipe(adam(1e-2), regulators=(lambda model, step, num_steps: seen.append(step),))
    course = recipe.start(build(), STEPS)
    run(course, range(3))
    recipe.start(build(), STEPS).load_state_dict(course.state_dict())
    assert seen == [0, 1, 2, 3, 0, 3]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_ends_the_course_before_its_step(value: str) -> None:
    model = build()
    course = TrainingRecipe(adamw(1e-2)).start(model, STEPS)
    run(course, range(3))
    before, state = weights(model), copy.deepcopy(course.optimizer.state_dict())
    with pytest.raises(DivergedError, match=f"the loss is {value} at step 3. Lower .*rate, and look at the batch"):
        course.step(loss_of(model, 3) * float(value))
    assert torch.equal(weights(model), before)
    torch.testing.assert_close(course.optimizer.state_dict(), state, rtol=0, atol=0)
    assert course.num_done == 3


@pytest.mark.parametrize("clipping", [no_clipping, *(GradientClipping(1.0, m) for m in ("norm", "value", "adaptive"))])
def test_a_gradient_that_is_not_finite_names_where_it_began(clipping: Clipping) -> None:
    model = build()
    course = TrainingRecipe(adamw(1e-2), clipping=clipping).start(model, STEPS)
    run(course, range(2))
    before = weights(model)

    def broken_below_the_last_layer(x: Tensor) -> Tensor:
        return model[3](BreakGradient.apply(model[:3](x)))

    loss = broken_below_the_last_layer(torch.ones(5, 3)).square().mean()
    assert loss.isfinite()
    with pytest.raises(
        DivergedError, match=r"the gradient's norm is nan at step 2, first in the backward pass at 0\.bias. Lower"
    ):
        course.step(loss)
    assert torch.equal(weights(model), before)


def test_finite_gradients_whose_norm_overflows_are_said_to_be_so() -> None:
    model = nn.Linear(3, 1)
    course = TrainingRecipe(adamw(1e-2)).start(model, STEPS)
    before = weights(model)
    # 1e30 is a float32; its square is none
    with pytest.raises(DivergedError, match="norm is inf at step 0, first in the backward pass at the sum of finite"):
        course.step(1e30 * model(torch.ones(1, 3)).sum())
    assert torch.equal(weights(model), before)


def test_a_course_goes_on_after_a_bad_batch() -> None:
    """One that is caught and left out changes nothing of the steps that follow."""
    plain, hit = build().eval(), build().eval()
    one, other = (TrainingRecipe(adamw(1e-2), clipping=GradientClipping(0.5)).start(m, STEPS) for m in (plain, hit))
    for step in range(4):
        one.step(loss_of(plain, step))
        with pytest.raises(DivergedError):
            other.step(loss_of(hit, step) * float("nan"))
        other.step(loss_of(hit, step))
    assert torch.equal(weights(plain), weights(hit))


@pytest.mark.parametrize("method", ["norm", "value", "adaptive"])
def test_clipping_makes_a_step_of_finite_gradients_whose_norm_overflows(method: str) -> None:
    model = nn.Linear(3, 1)
    course = TrainingRecipe(adamw(1e-2), clipping=GradientClipping(1.0, method)).start(model, STEPS)
    before = weights(model)
    norm = course.step(1e30 * model(torch.ones(1, 3)).sum())
    assert float(norm) == pytest.approx(2e30)  # of three weights and a bias, 1e30 each
    # Adam's first step is as long as the rate in each number; the decay, 1e-4 of numbers below 1, comes on top
    torch.testing.assert_close(before - weights(model), torch.full((4,), 1e-2), atol=1.1e-4, rtol=0)


def test_a_gradient_broken_outside_the_model_is_found_too() -> None:
    """A parameter of the loss itself, which the optimizer trains along."""
    model, temperature = build(), nn.Parameter(torch.ones(2))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([temperature, *model.parameters()], lr=0.1)

    course = TrainingRecipe(optimizer).start(model, STEPS)
    with pytest.raises(DivergedError, match=r"first in the backward pass at a parameter \[2\] outside the model"):
        course.step(loss_of(model, 0) + BreakGradient.apply(temperature).sum())


def test_the_loss_of_another_model_is_refused() -> None:
    course = TrainingRecipe(adamw(1e-2)).start(build(), STEPS)
    with pytest.raises(ArgumentError, match="none of its parameters got a gradient. Pass the loss of the Sequential"):
        course.step(loss_of(build(), 0))
    assert course.num_done == 0


def test_a_batch_may_come_in_parts() -> None:
    """Backward passes before the step add up, what stood before the course and after an error does not."""
    whole, parts = build().eval(), build().eval()
    loss_of(parts, 99).backward()
    one, other = (TrainingRecipe(adamw(1e-2), clipping=GradientClipping(0.5)).start(m, STEPS) for m in (whole, parts))
    for step in range(3):
        norm = one.step(loss_of(whole, step) / 2 + loss_of(whole, step + 50) / 2)
        loss_of(parts, 99).backward()
        with pytest.raises(DivergedError):
            other.step(loss_of(parts, step) * float("nan"))
        (loss_of(parts, step) / 2).backward()
        # float32, summed in another order
        torch.testing.assert_close(other.step(loss_of(parts, step + 50) / 2), norm, atol=0, rtol=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-5, rtol=0)


def test_the_state_of_a_course_of_other_length_is_refused() -> None:
    recipe = TrainingRecipe(adamw(1e-2))
    state, course = recipe.start(build(), 5).state_dict(), recipe.start(build(), 6)
    with pytest.raises(ArgumentError, match="state must be of a course with num_steps=6; got one with num_steps=5"):
        course.load_state_dict(state)


def test_an_optimizer_that_needs_the_loss_again_is_refused() -> None:
    with pytest.raises(CombinationError, match="LBFGS computes the loss several times a step"):
        TrainingRecipe(lambda model: torch.optim.LBFGS(model.parameters())).start(build(), STEPS)


@pytest.mark.parametrize("clipping", [no_clipping, *(GradientClipping(1.0, m) for m in ("norm", "value", "adaptive"))])
def test_sparse_gradients_are_refused(clipping: Clipping) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    course = TrainingRecipe(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), clipping=clipping)
    with pytest.raises(CombinationError, match=r"gradients must be dense; that of a parameter \[5, 2\] is sparse"):
        course.start(model, STEPS).step(model(torch.tensor([1, 1, 3])).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
            "optimizer must be a function; got a SGD",
        ),
        ({"clipping": 1.0}, r"clipping must be a function; got a float. Pass e.g. GradientClipping\(1.0\)"),
        ({"schedule": 0.5}, "schedule must be a function; got a float"),
        ({"regulators": lambda *call: None}, "regulators must be a tuple of functions"),
        ({"regulators": (0.1,)}, "regulators must be a tuple of functions"),
    ],
)
def test_parts_that_cannot_be_called_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainingRecipe(**{"optimizer": adamw(1e-2), **changes})
