"""How much does what the model has learned spare in labels?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.findings import Curve, Examination, NotApplicable, Remedy
from transformer_problems.problems.p06_data_hungry.untrained import untrained

_NUM_PIECES, _LENGTH = 96, 32  # each piece of text once whole and once corrupted
_NUM_IMAGES, _MOST_CLASSES = 128, 10
_REPLACED = 0.15  # of a piece's tokens, as in ELECTRA (Clark et al. 2020, arXiv:2003.10555)
_LABELS, _SIZES = 40, (6, 10, 20, 40, 64)
_NUM_DRAWS, _NUM_CURVE_DRAWS = 16, 6
_BATCH = 8  # a copy of the model is in memory beside it
_TOO_EASY = 0.9  # accuracy of random weights from which the task says nothing about training


@dataclass(frozen=True, slots=True)
class _Task:
    """Inputs with classes; examples of one group, such as the two forms of a piece, are never split.

    Args:
        told: What is told apart.
    """

    inputs: Inputs
    classes: Tensor
    groups: Tensor
    told: str


class LabelCheckup:
    """A linear classifier on the frozen model against the same on its architecture with random weights.

    Text: whole pieces against the same with 15% of the tokens replaced at random, a task that any text gives and that
    needs no labels of a person. Images: the user's, where they are sorted into classes and there are enough of them,
    since a model of clothes need not know digits; else scikit-learn's digits. A random network keeps much of its
    input, so that what it reaches is what the task gives away; only the difference is what training is worth.
    """

    problem = 6
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination | NotApplicable:
        task = _images(visit) if visit.subject.kind == "image" else _whole_or_corrupted(visit)
        body = visit.subject.with_model(cast("Any", visit.subject.model).base_model)  # its head would take time alone
        trained = _features(body, task.inputs)
        visit.progress(0.4)
        random = _features(untrained(body, visit.seed), task.inputs)
        visit.progress(0.8)
        curves: list[list[tuple[float, float]]] = [[], []]
        at: dict[int, list[Tensor]] = {}
        for size in _SIZES:
            num_draws = _NUM_DRAWS if size == _LABELS else _NUM_CURVE_DRAWS
            at[size] = [_accuracies(x, task, size, num_draws, visit) for x in (trained, random)]
            for curve, accuracies in zip(curves, at[size], strict=True):
                curve.append((size, float(accuracies.mean())))
        own, other = (float(accuracies.mean()) for accuracies in at[_LABELS])
        if other > _TOO_EASY:
            return NotApplicable(
                f"random weights tell {other:.0%} of {task.told} already, so this shows nothing about training: "
                "give texts, or images, of the kind that the model was made for"
            )
        return Examination(
            {"pretraining_gain": estimate(at[_LABELS][0] - at[_LABELS][1])},
            f"with {_LABELS} labels {own:.0%} of {task.told} told apart, {other:.0%} by random weights",
            _remedies(visit.subject, *curves),
            Curve(
                f"Accuracy by number of labels ({task.told})",
                "labels",
                "accuracy",
                tuple(curves[0]),
                {"random weights": tuple(curves[1])},
                x_log=True,
            ),
            {"accuracy_share": own, "random_weights_accuracy_share": other},
        )


def _whole_or_corrupted(visit: Visit) -> _Task:
    inputs = visit.inputs(_NUM_PIECES, _LENGTH)
    whole = inputs["input_ids"]
    draws = visit.generator("corrupted")
    others = torch.randint(int(visit.subject.config.vocab_size), whole.shape, generator=draws)
    replaced = torch.rand(whole.shape, generator=draws) < _REPLACED
    replaced[:, 0] = replaced[:, -1] = False  # where special tokens stand
    corrupted = torch.where(replaced.to(whole.device), others.to(whole.device), whole)
    return _Task(
        {
            "input_ids": torch.cat([whole, corrupted]),
            "attention_mask": inputs["attention_mask"].repeat(2, 1),
        },
        torch.arange(2).repeat_interleave(_NUM_PIECES),
        torch.arange(_NUM_PIECES).repeat(2),
        "whole and corrupted text",
    )


def _images(visit: Visit) -> _Task:
    shown, told = _sorted_images(visit.material)
    inputs = replace(visit, material=shown).images(_NUM_IMAGES)
    assert shown.classes is not None
    return _Task(inputs, shown.classes, torch.arange(_NUM_IMAGES), told)


def _sorted_images(material: Material) -> tuple[Material, str]:
    """As many images as are looked at, of at most ten classes, and what these are."""
    if material.images is not None and material.classes is not None:
        common = material.classes.bincount().argsort(descending=True, stable=True)[:_MOST_CLASSES]
        kept = torch.isin(material.classes, common).nonzero()[:, 0]
        if len(common) > 1 and len(kept) >= _NUM_IMAGES:
            kept = kept[torch.arange(_NUM_IMAGES) * len(kept) // _NUM_IMAGES]
            classes = material.classes[kept].unique(return_inverse=True)[1]
            return Material("own", images=material.images[kept], classes=classes), f"{len(common)} classes of images"
    from transformer_problems.lab.data.digits import load_digit_images  # brings scikit-learn into memory

    digits = load_digit_images()[1].take(torch.arange(_NUM_IMAGES))
    return Material("digits", images=digits.pixels.expand(-1, 3, -1, -1), classes=digits.classes), "ten digits"


def _features(subject: Subject, inputs: Inputs) -> Tensor:
    """Mean over the tokens in mid-depth, where a model of text is least bound to its own task; of images the last.

    Shape:
        output: [examples, C], float32 on the CPU.
    """
    found = []
    for start in range(0, len(next(iter(inputs.values()))), _BATCH):
        batch = {name: values[start : start + _BATCH] for name, values in inputs.items()}
        states = subject.run(batch, states=True).states
        found.append(states[-1 if subject.kind == "image" else len(states) // 2].float().mean(dim=1).cpu())
    return torch.cat(found)


def _accuracies(x: Tensor, task: _Task, num_labels: int, num_draws: int, visit: Visit) -> Tensor:
    """On what was not drawn for training, by draw; of each draw the same examples whatever the features."""
    num_groups = int(task.groups.max()) + 1
    num_drawn = num_labels * num_groups // len(task.groups)
    accuracies = []
    for draw in range(num_draws):
        order = torch.randperm(num_groups, generator=visit.generator("labels", num_labels, draw))
        training, testing = (torch.isin(task.groups, part) for part in (order[:num_drawn], order[num_drawn:]))
        told = _probe(x[training], task.classes[training], x[testing])
        accuracies.append((told == task.classes[testing]).double().mean())
    return torch.stack(accuracies)


def _probe(x: Tensor, classes: Tensor, asked: Tensor) -> Tensor:
    """Classes of what is asked, by ridge regression on standardised features; it has one solution, found at once.

    Solved by examples, of which there are fewer than features. The penalty is the width, which is what each example's
    squared norm is.
    """
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, asked = ((values - mean).double() / deviation for values in (x, asked))
    wanted = nn.functional.one_hot(classes).double()
    offset = wanted.mean(dim=0)
    kernel = x @ x.mT + x.shape[1] * torch.eye(len(x), dtype=torch.float64)
    scores: Tensor = asked @ (x.mT @ torch.linalg.solve(kernel, wanted - offset)) + offset
    return scores.argmax(dim=1)


def _remedies(
    subject: Subject, trained: list[tuple[float, float]], random: list[tuple[float, float]]
) -> tuple[Remedy, ...]:
    most, best = random[-1]
    enough = next((size for size, accuracy in trained if accuracy >= best), None)
    if enough is None:
        spared = Remedy("transfer-learning", f"needs more than {most:.0f} labels to match random weights", 1)
    else:  # read off the two curves: labels with which each of them is as good
        told = f"a linear layer with {enough:.0f} labels is as good as with {most:.0f} on random weights"
        spared = Remedy("transfer-learning", told, most / enough)
    return (
        spared,
        Remedy("fine-tuning", f"all {subject.num_parameters / 1e6:,.3g}M weights adapt, which takes more labels", 1),
        Remedy("self-supervised-pretraining", "trained on unlabelled data of your own, its features fit them", 1),
        Remedy("distillation", "a simpler model that does well on few labels hands on what it assumes", 1),
    )


CHECKUP = LabelCheckup()
