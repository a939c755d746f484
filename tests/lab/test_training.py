"""The training loop: what it minimises, what it repeats, and how it resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, DivergedError
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.training import BatchLoss, TrainingPlan, plain_recipe, train
from transformer_problems.solutions.training.recipe import TrainingRecipe


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


def make_dropping_model() -> nn.Module:
    """Its seed is the plan's, so dropout draws the same numbers wherever a run is cut."""
    with seeded(0, "model"):
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("cut_at", [10, 17, 29])
def test_dropout_goes_on_where_it_was_cut(cut_at: int, tmp_path: Path) -> None:
    plan = TrainingPlan(steps=30, checkpoint_every=5)
    straight, resumed, checkpoint = make_dropping_model(), make_dropping_model(), tmp_path / "run.checkpoint"
    expected = train(straight, batch_loss, plan)

    def cut(model: nn.Module, step: int) -> Tensor:
        if step == cut_at:
            raise PowerCut
        return batch_loss(model, step)

    with pytest.raises(PowerCut):
        train(make_dropping_model(), cut, plan, checkpoint=checkpoint)
    torch.rand(7)  # whatever the process drew before it resumes
    log = train(resumed, batch_loss, plan, checkpoint=checkpoint)
    assert log.losses == expected.losses
    assert torch.equal(weights(resumed), weights(straight))


def test_the_plans_seed_decides_what_dropout_draws() -> None:
    first, second = (train(make_dropping_model(), batch_loss, TrainingPlan(5, seed=seed)).losses for seed in (0, 1))
    assert first != second


def test_a_look_that_is_cut_short_is_done_again(tmp_path: Path) -> None:
    plan, checkpoint = TrainingPlan(steps=10, checkpoint_every=5), tmp_path / "run.checkpoint"

    def cut() -> None:
        raise PowerCut

    with pytest.raises(PowerCut):
        train(make_model(), batch_loss, plan, checkpoint=checkpoint, at_steps=cut)
    looks: list[int] = []
    log = train(make_model(), batch_loss, plan, checkpoint=checkpoint, at_steps=lambda: looks.append(1))
    assert looks == [1]
    assert log.steps == 10


class BreakGradient(torch.autograd.Function):
    """The identity, whose backward pass gives NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, float("nan"))


def ill_in_the_forward_pass(model: nn.Module, step: int) -> Tensor:
    """At step 7 the batch holds a number that is not finite."""
    x = torch.randn(16, 3, generator=generator(0, "batch", step))
    if step == 7:
        x[4, 1] = float("nan")
    return (model(x) - 1).square().mean()


def ill_in_the_backward_pass(model: nn.Module, step: int) -> Tensor:
    """At step 7 the gradient below the last layer is not finite, though the loss is."""
    x = torch.randn(16, 3, generator=generator(0, "batch", step))
    hidden = model[:2](x)
    return (model[2](BreakGradient.apply(hidden) if step == 7 else hidden) - 1).square().mean()


ILL = {
    ill_in_the_forward_pass: r"the loss is nan at step 7\..* The first layer to give such numbers is 0\.",
    ill_in_the_backward_pass: r"the gradient's norm is nan at step 7, first in the backward pass at 0\.bias\..* "
    r"In a repeated forward pass every layer's output was finite\.",
}


@pytest.mark.parametrize("loss", ILL, ids=lambda loss: loss.__name__)
def test_divergence_names_step_and_layer_and_keeps_what_was_good(loss: BatchLoss, tmp_path: Path) -> None:
    plan, checkpoint = TrainingPlan(steps=12, checkpoint_every=5), tmp_path / "run.checkpoint"
    hit, seen = make_model(), []

    def watched(model: nn.Module, step: int) -> Tensor:
        seen.append(weights(model).clone())
        return loss(model, step)

    with pytest.raises(DivergedError, match=ILL[loss]):
        train(hit, watched, plan, checkpoint=checkpoint)
    assert len(seen) == 9  # eight steps, and the last forward pass once more, to find the layer
    assert torch.equal(weights(hit), seen[7])
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["log"]["steps"] == 5
    assert torch.equal(torch.cat([v.flatten() for v in kept["model"].values()]), seen[5])

    def mended(model: nn.Module, step: int) -> Tensor:
        return loss(model, step if step < 7 else step + 100)

    straight, resumed = make_model(), make_model()
    train(straight, mended, plan)
    train(resumed, mended, plan, checkpoint=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))


def test_a_learning_rate_far_too_high_diverges_by_name() -> None:
    """Exponential growth, not a planted number: what the message is for."""
    recipe = TrainingRecipe(lambda model: torch.optim.SGD(model.parameters(), lr=1e6))
    with pytest.raises(DivergedError, match=r"at step \d+.*Lower the learning rate"):
        train(nn.Linear(3, 1), batch_loss, TrainingPlan(500, recipe))


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


def cut_at_17(model: nn.Module, step: int) -> Tensor:
    if step == 17:
        raise PowerCut
    return batch_loss(model, step)


@pytest.mark.parametrize(
    "other",
    [
        TrainingPlan(steps=40, checkpoint_every=10),
        TrainingPlan(steps=30, checkpoint_every=10, seed=1),
        TrainingPlan(steps=30, checkpoint_every=10, recipe=plain_recipe(0.1)),
        TrainingPlan(steps=30, recipe=TrainingRecipe(lambda model: torch.optim.SGD(model.parameters(), lr=3e-3))),
    ],
    ids=["steps", "seed", "learning rate", "optimizer"],
)
def test_a_checkpoint_of_another_plan_is_refused(other: TrainingPlan, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    with pytest.raises(PowerCut):
        train(make_model(), cut_at_17, TrainingPlan(steps=30, checkpoint_every=10), checkpoint=checkpoint)
    model = make_model()
    before = weights(model).clone()
    with pytest.raises(ArgumentError, match=r"checkpoint .*run\.checkpoint is of another plan: it was begun with .*30"):
        train(model, batch_loss, other, checkpoint=checkpoint)
    assert checkpoint.exists() and torch.equal(weights(model), before)


def test_names_with_points_have_partial_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    save = torch.save

    def watched_save(state: object, path: Path) -> None:
        written.append(path)
        save(state, path)

    monkeypatch.setattr(torch, "save", watched_save)
    for name in ("run.lr0.1", "run.lr0.2"):
        train(make_model(), batch_loss, TrainingPlan(steps=2, checkpoint_every=2), checkpoint=tmp_path / name)
    assert [path.name for path in written] == ["run.lr0.1.partial", "run.lr0.2.partial"]


def test_divergence_leaves_running_means_alone() -> None:
    with seeded(0, "model"):
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    seen: list[Tensor] = []

    def loss(model: nn.Module, step: int) -> Tensor:
        value = batch_loss(model, step)
        seen.append(model[1].running_mean.clone())
        return value * float("nan") if step == 3 else value

    with pytest.raises(DivergedError, match="the loss is nan at step 3"):
        train(model, loss, TrainingPlan(steps=5))
    assert len(seen) == 5 and not torch.equal(seen[4], seen[3])
    assert torch.equal(model[1].running_mean, seen[3])  # that of the pass which failed, not of the one that looks
