"""Small real images and sounds, rising numbers of examples: how much a built-in sense of nearness is worth."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.choice import choose_labels, draw_batch
from transformer_problems.lab.data.digits import load_digit_images
from transformer_problems.lab.data.speech import load_japanese_vowels
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p05_no_local_inductive_bias.distance import attention_distances
from transformer_problems.problems.p05_no_local_inductive_bias.models import image_model, speech_model

_SPEECH = ("encoder", "conformer")
_FEWEST = 20.0


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    image_examples: tuple[int, ...]
    speech_examples: tuple[int, ...]
    scale: int  # of all widths
    image_steps: int
    speech_steps: int
    batch_size: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((20, 90, 1400), (20, 90, 270), 8, 120, 40, batch_size=32, seeds=1),
    "standard": _Size((20, 90, 350, 1400), (20, 90, 270), 8, 300, 200, batch_size=32, seeds=5),
    "full": _Size((20, 90, 350, 1400), (20, 90, 270), 32, 3_000, 2_000, batch_size=64, seeds=10),
}


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs of a model, each [n, ...], and their classes [n]."""

    inputs: tuple[Tensor, ...]
    classes: Tensor

    def take(self, chosen: Tensor, device: torch.device) -> "Examples":
        return Examples(tuple(part[chosen].to(device) for part in self.inputs), self.classes[chosen].to(device))


class NoLocalInductiveBias:
    """Classifiers of digits and of speakers, trained on few to many examples of each, with as many parameters."""

    problem = 5
    arms = (
        Arm("vit", "Plain ViT"),
        Arm("cnn", "Convolutional stem + ViT", "cnn-transformer", lead=True),
        Arm("swin", "Swin", "swin", lead=True),
        Arm("encoder", "Plain encoder, speech"),
        Arm("conformer", "Conformer, speech", "conformer", lead=True, baseline="encoder"),
        Arm("pyramid", "Pyramid ViT", "hierarchical-vit", lead=True),
    )
    chart = Chart(
        metric="accuracy",
        problem_title="A plain Vision Transformer on digits",
        solutions_title="Others with as many parameters",
        x_label="training examples",
        y_label="right answers",
        better="higher",
        x_log=True,
    )
    columns = (
        Column("accuracy", "right with 20 examples", at=_FEWEST, better="higher", digits=2),
        Column("accuracy", "with 90", at=90.0, better="higher", digits=2),
        Column("accuracy_of_all", "with most", better="higher", digits=3),
        Column("attention_distance", "first layer looks across", at=1.0, digits=2),
        Column("attention_distance", "last layer", at=4.0, digits=2),
        Column("parameters", "parameters"),
        Column("flops", "FLOPs an example", better="lower", digits=2),
    )
    gains = (
        Effect(
            "accuracy",
            "difference",
            ("points fewer right answers", "points more right answers"),
            _FEWEST,
            "with 20 examples",
            scale=100,
        ),
    )
    costs = (
        Effect(
            "accuracy_of_all",
            "difference",
            ("points fewer with most examples", "points more with most examples"),
            scale=100,
        ),
        Effect("flops", "ratio", ("less arithmetic", "more arithmetic")),
    )
    shared_examples: frozenset[str] = frozenset()

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        known, tested = speech_examples() if arm in _SPEECH else image_examples()
        counts = size.speech_examples if arm in _SPEECH else size.image_examples
        model, right = nn.Module(), [0.0]
        for i, num in enumerate(counts):
            model = _trained(bench, size, known, num)
            right = correct(model, tested, bench.device)
            for repeat, value in enumerate(right):
                yield Measurement("accuracy", "1", value, x=num, x_unit="examples", repeat=repeat)
            bench.progress((i + 1) / len(counts))
        for repeat, value in enumerate(right):
            yield Measurement("accuracy_of_all", "1", value, repeat=repeat)
        yield Measurement("parameters", "1", sum(p.numel() for p in model.parameters()))
        one = tested.take(torch.arange(1), bench.device)
        yield Measurement("flops", "FLOP", count_flops(partial(_answer, model, one)))
        if isinstance(model, VisionTransformer):
            for layer, distance in enumerate(attention_distances(model, tested.inputs[0].to(bench.device))):
                yield Measurement("attention_distance", "1", distance, x=layer + 1, x_unit="layers")

    def finding(self, results: Results) -> str:
        many = max(results.xs("vit", "accuracy"))
        first, last, near, far = (
            results.samples("vit", metric, x)
            for metric, x in (
                ("accuracy", _FEWEST),
                ("accuracy", many),
                ("attention_distance", 1.0),
                ("attention_distance", max(results.xs("vit", "attention_distance"))),
            )
        )
        assert first is not None
        assert last is not None
        assert near is not None
        assert far is not None
        return (
            f"With {_FEWEST:.0f} examples a plain Vision Transformer gets {first.mean():.0%} of digits right, with "
            f"{many:.0f} it gets {last.mean():.0%}; even then its first layer looks across {near.mean():.0%} of the "
            f"image and its last across {far.mean():.0%}."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES["standard"]
        return (
            "Images are scikit-learn's digits of 8 x 8 pixels, which windows and pyramids were not made for; speech "
            "is that of nine speakers who say one diphthong, as 12 coefficients a frame, and the speaker is asked for.",
            f"At standard scale every model of images takes {size.image_steps} steps, every model of speech "
            f"{size.speech_steps}, whatever the number of examples. Where an interval is wide, some seeds had not left "
            "chance by then: that is speed of learning as much as what was learned.",
        )


def image_examples() -> tuple[Examples, Examples]:
    """scikit-learn's digits, for training and for test."""
    train_images, test_images = load_digit_images()
    return Examples((train_images.pixels,), train_images.classes), Examples((test_images.pixels,), test_images.classes)


def speech_examples() -> tuple[Examples, Examples]:
    """Utterances of nine speakers, for training and for test; their coefficients and which frames are real."""
    known, tested = load_japanese_vowels("TRAIN"), load_japanese_vowels("TEST")
    return Examples((known.features, known.key_mask), known.classes), Examples(
        (tested.features, tested.key_mask), tested.classes
    )


def build_model(arm: str, scale: int) -> nn.Module:
    """The arm's untrained model."""
    return speech_model(arm, scale) if arm in _SPEECH else image_model(arm, scale)


def _trained(bench: Bench, size: _Size, known: Examples, num: int) -> nn.Module:
    seed, device = bench.cell.seed, bench.device
    steps = size.speech_steps if bench.cell.arm in _SPEECH else size.image_steps
    with seeded(seed, "model"):
        model = build_model(bench.cell.arm, size.scale).to(device)
    few = known.take(choose_labels(known.classes, num, generator(seed, "examples")), device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        batch = few.take(draw_batch(num, size.batch_size, seed, step).to(device), device)
        return nn.functional.cross_entropy(_answer(model, batch), batch.classes)

    train(model, batch_loss, TrainingPlan(steps, plain_recipe(), seed=seed))
    return model


def _answer(model: nn.Module, examples: Examples) -> Tensor:
    inputs, *masks = examples.inputs
    logits: Tensor = model(inputs, key_mask=masks[0]) if masks else model(inputs)
    return logits


@torch.no_grad()
def correct(model: nn.Module, tested: Examples, device: torch.device) -> list[float]:
    """Whether each example is classified rightly, 1 or 0."""
    everything = tested.take(torch.arange(len(tested.classes)), device)
    right: list[float] = (_answer(model, everything).argmax(dim=1) == everything.classes).double().tolist()
    return right


EXPERIMENT = NoLocalInductiveBias()
