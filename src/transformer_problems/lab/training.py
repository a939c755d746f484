"""The one training loop of all experiments: seeded, resumable, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, DivergedError
from transformer_problems.core.seeding import seeded
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.clipping import GradientClipping
from transformer_problems.solutions.training.divergence import first_nonfinite_layer
from transformer_problems.solutions.training.recipe import Regulator, Schedule, TrainingCourse, TrainingRecipe
from transformer_problems.solutions.training.warmup import Warmup

BatchLoss = Callable[[nn.Module, int], Tensor]
"""(model, step) -> scalar loss; the batch is drawn from the step's own seed, so any step can be repeated."""


_PLAIN_SCHEDULE = Warmup(20)


def plain_recipe(
    learning_rate: float = 3e-3, schedule: Schedule = _PLAIN_SCHEDULE, *, regulators: tuple[Regulator, ...] = ()
) -> TrainingRecipe:
    """AdamW and clipping by norm: what every experiment trains with, unless training is what it is about.

    Args:
        learning_rate: Peak.
        schedule: Default 20 steps of warmup, then a cosine down to a tenth.
        regulators: What else changes from step to step.
    """
    return TrainingRecipe(
        adamw(learning_rate), schedule=schedule, clipping=GradientClipping(1.0), regulators=regulators
    )


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how to train.

    Args:
        steps: Optimizer steps.
        recipe: Optimizer, schedule, clipping.
        min_train_s: Train at least this long, past `steps` if need be, for comparisons at equal seconds.
        checkpoint_every: Steps between checkpoints, where a checkpoint path is given.
        seed: Of the random draws inside the model, such as dropout.
    """

    steps: int
    recipe: TrainingRecipe = field(default_factory=plain_recipe)
    min_train_s: float = 0.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_int(steps=self.steps, checkpoint_every=self.checkpoint_every)


@dataclass(slots=True)
class TrainingLog:
    """What happened: steps done, seconds spent in steps, the loss of each."""

    steps: int = 0
    train_s: float = 0.0
    losses: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    batch_loss: BatchLoss,
    plan: TrainingPlan,
    *,
    at_steps: Callable[[], None] | None = None,
    at_seconds: Callable[[], None] | None = None,
    progress: Callable[[float], None] | None = None,
    checkpoint: Path | None = None,
) -> TrainingLog:
    """Train in place, as the plan's recipe says.

    Args:
        at_steps: Called once when `plan.steps` are done; neither its time nor that of `at_seconds` is counted.
        at_seconds: Called once when `plan.min_train_s` have passed, before or after `at_steps`.
        progress: Told the finished fraction.
        checkpoint: File to resume from and to save to; removed when training is complete. A run that resumes beyond the
            point of a look does not look again, so a look has to keep what it finds where another process finds it.

    Returns:
        The log; `train_s` counts steps only.

    Raises:
        ArgumentError: If the checkpoint is of another plan: other steps, seed, optimizer or learning rates.
        DivergedError: If a loss or a gradient is not finite; it names the step and the first layer that gave such
            numbers. The last checkpoint stays where it is, and the weights are as they were before that step.
    """
    log = TrainingLog()
    with seeded(plan.seed, "training"):
        course = plan.recipe.start(model, plan.steps)
        if checkpoint is not None and checkpoint.exists():
            _resume(checkpoint, model, course, log, plan)
        model.train()
        while log.steps < plan.steps or log.train_s < plan.min_train_s:
            started = time.perf_counter()
            _step(model, batch_loss, course, log)
            before_s = log.train_s
            log.train_s += time.perf_counter() - started
            if progress is not None:
                progress(_fraction(log, plan))
            if log.steps == plan.steps and at_steps is not None:
                _look_at(model, at_steps)
            if before_s < plan.min_train_s <= log.train_s and at_seconds is not None:
                _look_at(model, at_seconds)
            if checkpoint is not None and log.steps % plan.checkpoint_every == 0:
                _save(checkpoint, model, course, log, plan)  # after the looks: one that is cut short is done again
    model.eval()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return log


def _step(model: nn.Module, batch_loss: BatchLoss, course: TrainingCourse, log: TrainingLog) -> None:
    loss = batch_loss(model, log.steps)
    try:
        course.step(loss)
    except DivergedError as error:
        layer = first_nonfinite_layer(model, lambda: batch_loss(model, log.steps))
        where = (
            "In a repeated forward pass every layer's output was finite"
            if layer is None
            else f"The first layer to give such numbers is {layer}"
        )
        raise DivergedError(f"{error} {where}.") from error
    log.losses.append(loss.item())
    log.steps += 1


def _look_at(model: nn.Module, look: Callable[[], None]) -> None:
    model.eval()
    look()
    model.train()


def _fraction(log: TrainingLog, plan: TrainingPlan) -> float:
    by_steps = min(1.0, log.steps / plan.steps)
    return by_steps if plan.min_train_s == 0 else min(by_steps, log.train_s / plan.min_train_s, 1.0)


def _save(path: Path, model: nn.Module, course: TrainingCourse, log: TrainingLog, plan: TrainingPlan) -> None:
    state: dict[str, Any] = {
        "plan": _marks(plan, course),
        "model": model.state_dict(),
        "course": course.state_dict(),
        "log": {"steps": log.steps, "train_s": log.train_s, "losses": log.losses},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    torch.save(state, partial)
    partial.replace(path)  # a checkpoint is whole or absent, whenever the process dies


def _resume(path: Path, model: nn.Module, course: TrainingCourse, log: TrainingLog, plan: TrainingPlan) -> None:
    state = torch.load(path, weights_only=True, map_location="cpu")  # where Adam's step counts belong
    begun, wanted = state.get("plan"), _marks(plan, course)
    if begun != wanted:
        raise ArgumentError(
            f"checkpoint {path} is of another plan: it was begun with {begun}, this plan has {wanted}. Remove the file "
            "to train anew, or go on with the plan it was begun with."
        )
    model.load_state_dict(state["model"])
    course.load_state_dict(state["course"])
    log.steps, log.train_s, log.losses = state["log"]["steps"], state["log"]["train_s"], state["log"]["losses"]


def _marks(plan: TrainingPlan, course: TrainingCourse) -> dict[str, Any]:
    """What tells plans apart, as far as it can be written down: schedules and clipping are functions."""
    return {
        "steps": plan.steps,
        "seed": plan.seed,
        "optimizer": type(course.optimizer).__name__,
        "learning_rates": [float(group["initial_lr"]) for group in course.optimizer.param_groups],
    }
