"""How many labels a small Transformer needs, from scratch and with each way to need fewer: images and text."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.choice import choose_labels
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import BatchLoss, TrainingPlan, plain_recipe, train
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p06_data_hungry.images import (
    image_model,
    image_task,
    masked_image_loss,
    masked_image_model,
    taught_loss,
)
from transformer_problems.problems.p06_data_hungry.task import Labelled, Task, correct, labelled_loss
from transformer_problems.problems.p06_data_hungry.texts import VOCAB_SIZE, masked_text_loss, text_model, text_task
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.fine_tuning import GradualUnfreezing, layerwise_learning_rates
from transformer_problems.solutions.training.masked_autoencoder import MaskedAutoencoder
from transformer_problems.solutions.training.transfer import linear_probe, transfer_weights

Kind = Literal["unlabelled", "source"]
"""What a model is pretrained on: inputs without labels, or a related task with them."""

_OF_ALL, _OF_A_HEAD = 3e-3, 1e-2  # peak learning rates: of all weights, of a linear probe
_FIRST_TEXT = 1000  # number of the first test text: texts are other examples than images, which are fewer
_BY_LAYER = 0.7  # a layer's learning rate, in that of the layer above


@dataclass(frozen=True, slots=True)
class _Budget:
    """How long a model trains, on whatever number of labels, and before it sees any."""

    steps: int
    pretraining_steps: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    labels: tuple[int, ...]
    width: int
    images: _Budget
    texts: _Budget
    num_excerpts: int  # of text that labels may be asked for
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((10, 100, 500), 48, _Budget(80, 100, 32), _Budget(30, 40, 16), num_excerpts=1000, seeds=1),
    "standard": _Size((10, 30, 100, 500), 48, _Budget(300, 900, 32), _Budget(200, 600, 16), num_excerpts=2000, seeds=5),
    "full": _Size(
        (10, 20, 50, 100, 200, 500), 192, _Budget(2_000, 20_000, 64), _Budget(2_000, 50_000, 64), 2000, seeds=10
    ),
}


class DataHungry:
    """Classifiers trained on 10 to 500 labels; what else they may learn from depends on the arm."""

    problem = 6
    arms = (
        Arm("scratch", "From scratch"),
        Arm("self_supervised", "Masked autoencoding", "self-supervised-pretraining", lead=True),
        Arm("probe", "Transfer, linear probe", "transfer-learning", lead=True),
        Arm("fine_tuned", "Transfer, fine-tuned", "fine-tuning", lead=True),
        Arm("layerwise", "Fine-tuned by layers", "fine-tuning"),
        Arm("distilled_hard", "Distilled from an SVM, hard", "distillation", lead=True),
        Arm("distilled_soft", "Distilled from an SVM, soft", "distillation"),
        Arm("teacher", "the SVM itself"),
        Arm("text_scratch", "text: from scratch"),
        Arm("text_self_supervised", "text: masked bytes", "self-supervised-pretraining", baseline="text_scratch"),
        Arm("text_probe", "text: linear probe", "transfer-learning", baseline="text_scratch"),
        Arm("text_fine_tuned", "text: fine-tuned", "fine-tuning", baseline="text_scratch"),
        Arm("text_teacher", "text: an SVM on n-grams"),
    )
    chart = Chart(
        metric="accuracy",
        problem_title="Digits, a small ViT from scratch",
        solutions_title="The same model with each help",
        x_label="labels",
        y_label="right answers",
        better="higher",
        x_log=True,
        draws=("scratch", "self_supervised", "probe", "fine_tuned", "distilled_hard", "teacher"),
    )
    columns = (
        Column("label_efficiency", "area under the curve", better="higher"),
        Column("accuracy", "right with 10 labels", at=10.0, better="higher", digits=2),
        Column("accuracy", "right with 100", at=100.0, better="higher", digits=2),
        Column("accuracy", "right with 500", at=500.0, better="higher", digits=2),
        Column("labels_needed", "labels for 80% (text: 40%)", better="lower", digits=2),
    )
    gains = (
        Effect(
            "label_efficiency",
            "difference",
            ("points less area under the curve", "points more area under the curve"),
            scale=100,
        ),
    )
    costs = (
        Effect(
            "accuracy",
            "difference",
            ("points fewer right", "points more right"),
            "last",
            "with {x:.0f} labels",
            scale=100,
        ),
        Effect("steps", "ratio", ("fewer training steps", "more training steps")),
    )
    shared_examples = frozenset({"accuracy", "label_efficiency"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        is_text = arm.startswith("text_")
        task = text_task(size.num_excerpts) if is_text else image_task()
        start = _Start(bench, size, task, is_text)
        first = _FIRST_TEXT if is_text else 0
        curve: dict[int, list[float]] = {}
        for i, num in enumerate(size.labels):
            chosen = choose_labels(task.train[1], num, generator(bench.cell.seed, "labels"))
            labelled = task.train[0][chosen], task.train[1][chosen]
            curve[num] = correct(_answers(start, arm.removeprefix("text_"), labelled), task.test[1])
            for repeat, value in enumerate(curve[num], start=first):
                yield Measurement("accuracy", "1", value, x=num, x_unit="labels", repeat=repeat)
            bench.progress(0.3 + 0.7 * (i + 1) / len(size.labels))
        for repeat, area in enumerate(areas(curve), start=first):
            yield Measurement("label_efficiency", "1", area, repeat=repeat)
        if (needed := labels_needed(curve, task.set_accuracy)) is not None:
            yield Measurement("labels_needed", "1", needed)
        if not arm.endswith("teacher"):
            yield Measurement("steps", "1", start.budget.steps + start.pretraining_steps)

    def finding(self, results: Results) -> str:
        few, many = min(results.xs("scratch", "accuracy")), max(results.xs("scratch", "accuracy"))
        ours, teacher = ([results.samples(arm, "accuracy", x) for x in (few, many)] for arm in ("scratch", "teacher"))
        assert ours[0] is not None
        assert ours[1] is not None
        sentence = (
            f"With {few:.0f} labels a small Vision Transformer trained from scratch gets {ours[0].mean():.0%} of "
            f"five kinds of digits right, with {many:.0f} it gets {ours[1].mean():.0%}"
        )
        if teacher[0] is None or teacher[1] is None:
            return f"{sentence}."
        return f"{sentence}; a support vector machine gets {teacher[0].mean():.0%} and {teacher[1].mean():.0%}."

    def notes(self, results: Results) -> tuple[str, ...]:
        return (
            "Images are the digits 5 to 9, of 8 x 8 pixels; the related task is 0 to 4. Masked autoencoding sees every "
            "image but the test's without its label, and the distilled student sees the task's own, with what a "
            "support vector machine that was trained on the few labels says of them: without images to spare both have "
            "less to offer.",
            "Texts are excerpts of 128 bytes from five packages of the standard library, to be told apart; the related "
            "task is five other packages. No test excerpt's file is seen by any training.",
            "All arms take the same steps on the labels at the same peak learning rate, but for the linear probe, "
            "whose head alone learns, at a higher one. What came before the labels is counted as training steps.",
        )


@dataclass(slots=True)
class _Start:
    """Where the models of a cell begin, whatever the number of labels.

    Args:
        pretraining_steps: Those behind a pretrained model, once one was asked for.
    """

    bench: Bench
    size: _Size
    task: Task
    is_text: bool
    pretraining_steps: int = 0

    @property
    def budget(self) -> _Budget:
        return self.size.texts if self.is_text else self.size.images

    def new_model(self) -> Encoder | VisionTransformer:
        width, num_classes = self.size.width, self.task.num_classes
        with seeded(self.bench.cell.seed, "model"):
            model = text_model(width, num_classes) if self.is_text else image_model(width, num_classes)
        return model.to(self.bench.device)

    def pretrained(self, kind: Kind) -> Encoder | VisionTransformer:
        """A new model with the weights that a pretraining left; all arms of a seed and kind share it."""
        bench, size = self.bench, self.size
        self.pretraining_steps = self.budget.pretraining_steps
        recipe = {"problem": 6, "kind": kind, "text": self.is_text, "seed": bench.cell.seed, **asdict(size)}

        def build() -> nn.Module:
            with seeded(bench.cell.seed, "pretraining"):
                return self._unpretrained(kind).to(bench.device)

        def train_first(model: nn.Module, checkpoint: Path) -> None:
            plan = TrainingPlan(self.budget.pretraining_steps, plain_recipe(_OF_ALL), seed=bench.cell.seed)
            train(model, self._pretraining_loss(kind), plan, checkpoint=checkpoint)

        found, model = bench.models.get(recipe, build, train_first), self.new_model()
        trained = cast("nn.Module", found.encoder) if isinstance(found, MaskedAutoencoder) else found
        transfer_weights(trained, model, skip=["head"])
        return model

    def _unpretrained(self, kind: Kind) -> nn.Module:
        if kind == "source":
            return self.new_model()
        return text_model(self.size.width, VOCAB_SIZE) if self.is_text else masked_image_model(self.size.width)

    def _pretraining_loss(self, kind: Kind) -> BatchLoss:
        seed, device, batch_size = self.bench.cell.seed, self.bench.device, self.budget.batch_size
        if kind == "source":
            return labelled_loss(self.task, self.task.source, batch_size, seed, device)
        if self.is_text:
            return masked_text_loss(batch_size, seed, device)
        return masked_image_loss(self.task, batch_size, seed, device)


def _answers(start: _Start, arm: str, labelled: Labelled) -> Tensor:
    """Scores of the test's inputs after learning from the labels as the arm does, [n, K]."""
    task, seed, device = start.task, start.bench.cell.seed, start.bench.device
    batch_size = start.budget.batch_size
    if arm == "teacher":
        return task.teach(*labelled)(task.test[0])
    loss = labelled_loss(task, labelled, batch_size, seed, device)
    recipe = plain_recipe(_OF_ALL)
    scope: AbstractContextManager[None] = nullcontext()
    if arm == "scratch":
        model = start.new_model()
    elif arm.startswith("distilled"):
        with seeded(seed, "model"):
            model = image_model(start.size.width, task.num_classes, num_class_tokens=2).to(device)
        loss = taught_loss(task, labelled, arm == "distilled_hard", batch_size, seed, device)
    else:
        model = start.pretrained("unlabelled" if arm == "self_supervised" else "source")
    if arm == "probe":
        recipe, scope = plain_recipe(_OF_A_HEAD), linear_probe(model, model.head)
    if arm == "layerwise":
        by_layer = adamw(_OF_ALL, groups=layerwise_learning_rates(_BY_LAYER))
        recipe = replace(recipe, optimizer=by_layer, regulators=(GradualUnfreezing(start.budget.steps // 10),))
    with scope:
        train(model, loss, TrainingPlan(start.budget.steps, recipe, seed=seed))
    with torch.no_grad():
        return task.classify(model, task.test[0].to(device))


def areas(curve: Mapping[int, list[float]]) -> list[float]:
    """Each test example's mean over the logarithm of the number of labels, by the trapezoid rule: 1 if always right.

    Args:
        curve: For each number of labels whether each example was answered rightly, 1 or 0.
    """
    logs = np.log(list(curve))
    means: list[float] = (np.trapezoid(np.array(list(curve.values())), logs, axis=0) / (logs[-1] - logs[0])).tolist()
    return means


def labels_needed(curve: Mapping[int, list[float]], accuracy: float) -> float | None:
    """Labels at which the mean curve first reaches an accuracy, logarithms read between points; None if never."""
    before: tuple[int, float] | None = None
    for num, right in curve.items():
        reached = sum(right) / len(right)
        if reached >= accuracy:
            if before is None:
                return float(num)
            share = (accuracy - before[1]) / (reached - before[1])
            return float(before[0] * (num / before[0]) ** share)
        before = num, reached
    return None


EXPERIMENT = DataHungry()
