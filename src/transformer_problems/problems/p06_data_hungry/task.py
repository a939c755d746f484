"""A task with few labels, and what it means to learn it: the same steps for images and for texts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.training import BatchLoss

Labelled = tuple[Tensor, Tensor]
"""Inputs [n, ...] and their classes [n]."""

Teacher = Callable[[Tensor], Tensor]
"""Scores of the classes for inputs, [n, K]."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One classification task.

    Args:
        train: What labels may be asked for.
        test: What accuracy is measured on.
        source: A related task with labels to spare, whose classes are others.
        classify: (model, inputs) -> logits [n, K].
        teach: Trains a teacher that is no Transformer on some labels.
        set_accuracy: The accuracy that a method is asked how many labels it needs for.
    """

    train: Labelled
    test: Labelled
    source: Labelled
    classify: Callable[[nn.Module, Tensor], Tensor]
    teach: Callable[[Tensor, Tensor], Teacher]
    set_accuracy: float

    @property
    def num_classes(self) -> int:
        return int(self.train[1].max()) + 1


def labelled_loss(task: Task, labelled: Labelled, batch_size: int, seed: int, device: torch.device) -> BatchLoss:
    """Cross-entropy on batches drawn from the labelled examples."""
    inputs, classes = (part.to(device) for part in labelled)

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = draw_batch(len(classes), batch_size, seed, step).to(device)
        return nn.functional.cross_entropy(task.classify(model, inputs[chosen]), classes[chosen])

    return loss


@torch.no_grad()
def correct(logits: Tensor, classes: Tensor) -> list[float]:
    """Whether each answer is right, 1 or 0. logits: [n, K]; classes: [n]."""
    return (logits.argmax(dim=1).cpu() == classes).double().tolist()
