"""The training loop: what it minimises, what it repeats, and how it resumes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train


def make_model() -> nn.Module:
    with seeded(0, "model"):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def batch_loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 3, generator=generator(0, "batch", step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_it_learns() -> None:
    log = train(make_model(), batch_loss, TrainingPlan(200, plain_recipe(0.03)))
    assert log.steps == len(log.losses) == 200
    assert sum(log.losses[-10:]) < 0.1 * sum(log.losses[:10])


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = make_model(), make_model()
    for model in (first, second):
        train(model, batch_loss, TrainingPlan(steps=20))
    assert torch.equal(weights(first), weights(second))


def test_an_interrupted_run_resumes_bit_exactly(tmp_path: Path) -> None:
    plan = TrainingPlan(steps=30, checkpoint_every=10)
    straight = make_model()
    expected = train(straight, batch_loss, plan)

    class PowerCut(Exception):
        pass

    def cut(model: nn.Module, step: int) -> Tensor:
        if step == 17:
            raise PowerCut
        return batch_loss(model, step)

    checkpoint = tmp_path / "run.checkpoint"
    with pytest.raises(PowerCut):
        train(make_model(), cut, plan, checkpoint=checkpoint)
    resumed = make_model()
    log = train(resumed, batch_loss, plan, checkpoint=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))
    assert log.losses == expected.losses
    assert not checkpoint.exists()


def test_steps_and_seconds_are_looked_at_when_they_come() -> None:
    seen: list[str] = []

    def look(plan: TrainingPlan) -> int:
        seen.clear()
        log = train(
            make_model(),
            batch_loss,
            plan,
            at_steps=lambda: seen.append("steps"),
            at_seconds=lambda: seen.append("seconds"),
        )
        assert log.steps >= plan.steps
        assert log.train_s >= plan.min_train_s
        return log.steps

    assert look(TrainingPlan(steps=2, min_train_s=0.1)) > 2
    assert seen == ["steps", "seconds"]
    assert look(TrainingPlan(steps=50, min_train_s=1e-6)) == 50
    assert seen == ["seconds", "steps"]


def test_a_plan_without_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="steps must be positive; got 0"):
        TrainingPlan(steps=0)
