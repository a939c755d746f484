"""The one training loop of all experiments: seeded, resumable, measured."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive

BatchLoss = Callable[[nn.Module, int], Tensor]
"""(model, step) -> scalar loss; the batch is drawn from the step's own seed, so any step can be repeated."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how fast to train.

    Args:
        steps: Optimizer steps.
        learning_rate: Peak, reached after `warmup_steps`.
        decay: Cosine decay to a tenth of the peak; False keeps the peak.
        min_train_s: Train at least this long, past `steps` if need be, for comparisons at equal seconds.
        checkpoint_every: Steps between checkpoints, where a checkpoint path is given.
    """

    steps: int
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    decay: bool = True
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    min_train_s: float = 0.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, learning_rate=self.learning_rate, clip_norm=self.clip_norm)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if not self.decay:
            return self.learning_rate * warm
        progress = min(1.0, step / self.steps)
        return self.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


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
    """Train in place with AdamW, linear warmup and gradient clipping.

    Args:
        at_steps: Called once when `plan.steps` are done; neither its time nor that of `at_seconds` is counted.
        at_seconds: Called once when `plan.min_train_s` have passed, before or after `at_steps`.
        progress: Told the finished fraction.
        checkpoint: File to resume from and to save to; removed when training is complete.

    Returns:
        The log; `train_s` counts steps only.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    log = TrainingLog()
    if checkpoint is not None and checkpoint.exists():
        _resume(checkpoint, model, optimizer, log)
    model.train()
    while log.steps < plan.steps or log.train_s < plan.min_train_s:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(log.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(model, log.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        optimizer.step()
        log.losses.append(loss.item())
        log.steps += 1
        before_s = log.train_s
        log.train_s += time.perf_counter() - started
        if progress is not None:
            progress(_fraction(log, plan))
        if checkpoint is not None and log.steps % plan.checkpoint_every == 0:
            _save(checkpoint, model, optimizer, log)
        if log.steps == plan.steps and at_steps is not None:
            _look_at(model, at_steps)
        if before_s < plan.min_train_s <= log.train_s and at_seconds is not None:
            _look_at(model, at_seconds)
    model.eval()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return log


def _look_at(model: nn.Module, look: Callable[[], None]) -> None:
    model.eval()
    look()
    model.train()


def _fraction(log: TrainingLog, plan: TrainingPlan) -> float:
    by_steps = min(1.0, log.steps / plan.steps)
    return by_steps if plan.min_train_s == 0 else min(by_steps, log.train_s / plan.min_train_s, 1.0)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: TrainingLog) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log": {"steps": log.steps, "train_s": log.train_s, "losses": log.losses},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)  # a checkpoint is whole or absent, whenever the process dies


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: TrainingLog) -> None:
    state = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.steps, log.train_s, log.losses = state["log"]["steps"], state["log"]["train_s"], state["log"]["losses"]
