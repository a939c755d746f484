"""Small real images and sounds, rising numbers of examples: how much a built-in sense of nearness is worth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.choice import choose_labels, draw_batch
from transformer_problems.lab.data.digits import DIGITS_SOURCE
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench, OwnData
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p05_no_local_inductive_bias.distance import attention_distances, blind_distance
from transformer_problems.problems.p05_no_local_inductive_bias.models import image_model, speech_model
from transformer_problems.problems.p05_no_local_inductive_bias.task import (
    DIGITS,
    OWN_SECONDS,
    SPEAKERS,
    SPEECH,
    Examples,
    Form,
    Task,
    built_in_task,
    listed_kind,
    own_task,
)

_FEWEST = 20.0
_LOOKED_AT = 300  # test images whose attention is measured, and the most examples that are tested at once
_SCORES_AT_ONCE = 20_000_000  # of a head, between the frames of sounds that are tested at once


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
    "quick": _Size((20, 90, 1400), (20, 90, 270), 8, 180, 60, batch_size=32, seeds=1),
    "standard": _Size((20, 90, 350, 1400), (20, 90, 270), 8, 300, 200, batch_size=32, seeds=5),
    "full": _Size((20, 90, 350, 1400), (20, 90, 270), 32, 3_000, 2_000, batch_size=64, seeds=10),
}


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
        problem_title="A plain Vision Transformer",
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
        task = own_task(bench.data, lambda share: bench.progress(share / 10)) if bench.data else built_in_task(arm)
        counts = size.speech_examples if arm in SPEECH else size.image_examples
        if bench.data:
            yield Measurement("own_examples", "1", len(task.known))
            yield Measurement("left_out", "1", task.num_skipped)
            yield Measurement("cut", "1", task.num_cut)
            counts = (*(num for num in counts if num < len(task.known)), len(task.known))
        model, right = nn.Module(), [0.0]
        for i, num in enumerate(counts):
            model = _trained(bench, size, task, num)
            right = correct(model, task.tested, bench.device)
            for repeat, value in enumerate(right):
                yield Measurement("accuracy", "1", value, x=num, x_unit="examples", repeat=repeat)
            bench.progress(0.1 + 0.9 * (i + 1) / len(counts))
        for repeat, value in enumerate(right):
            yield Measurement("accuracy_of_all", "1", value, repeat=repeat)
        yield Measurement("parameters", "1", sum(p.numel() for p in model.parameters()))
        one = task.tested.select(torch.arange(1), bench.device)
        yield Measurement("flops", "FLOP", count_flops(partial(_answer, model, one)))
        if isinstance(model, VisionTransformer):
            some = task.tested.select(torch.arange(min(_LOOKED_AT, len(task.tested))), bench.device)
            yield Measurement("blind_distance", "1", blind_distance(model, some.numbers()[0]))
            for layer, distance in enumerate(attention_distances(model, some.numbers()[0])):
                yield Measurement("attention_distance", "1", distance, x=layer + 1, x_unit="layers")

    def finding(self, results: Results) -> str:
        plain, kind = ("vit", "images") if results.xs("vit", "accuracy") else ("encoder", "recordings")
        name = "Vision Transformer" if plain == "vit" else "encoder"
        few, many = (results.xs(plain, "accuracy")[i] for i in (0, -1))
        told = f"With {few:.0f} examples a plain {name} gets {results.mean(plain, 'accuracy', few):.0%} of {kind} right"
        if many > few:
            told += f", with {many:,.0f} it gets {results.mean(plain, 'accuracy', many):.0%}"
        layers = results.xs(plain, "attention_distance")
        if not layers:
            return f"{told}."
        near, far = (results.mean(plain, "attention_distance", layers[i]) for i in (0, -1))
        blind = results.samples(plain, "blind_distance")
        beside = (
            f", where attention to all places alike would look across {blind.mean():.0%}" if blind is not None else ""
        )
        return (
            f"{told}; its first layer then looks across {near:.0%} of the image and its last across {far:.0%}{beside}."
        )

    def arms_for(self, data: OwnData) -> frozenset[str]:
        return SPEECH if listed_kind(data) == "sounds" else self._seeing

    def not_asked(self, results: Results) -> Mapping[str, str]:
        own = {arm.slug for arm in self.arms if results.largest(arm.slug, "own_examples") is not None}
        if not own:
            return {}
        if own & SPEECH:
            return dict.fromkeys(self._seeing, "for images only")
        return dict.fromkeys(SPEECH, "for recordings only")

    @property
    def _seeing(self) -> frozenset[str]:
        return frozenset(arm.slug for arm in self.arms) - SPEECH

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES[results.scale]
        sources = (
            f"Images are {DIGITS_SOURCE}, which windows and pyramids were not made for; speech is that of nine "
            "speakers who say one diphthong, as 12 coefficients a frame, and the speaker is asked for (Kudo, Toyama "
            "and Shimbo's Japanese Vowels, UCI, as the package aeon carries it)."
        )
        if self.not_asked(results):
            sources = _told_of_own_data(results, [arm.slug for arm in self.arms])
        return (
            sources,
            f"Every model of images takes {size.image_steps} steps, every model of speech "
            f"{size.speech_steps}, of {size.batch_size} examples, whatever there are, with AdamW at a peak rate of "
            "0.003. Where an interval is wide, some seeds had not left chance by then, and with most examples training "
            "had not ended: that is speed of learning as much as what was learned.",
        )


def _told_of_own_data(results: Results, arms: Sequence[str]) -> str:
    """What a reader must know of the user's own data."""
    left_out, cut, fewest = (
        max(filter(None, (results.largest(arm, metric) for arm in arms)), default=0.0)
        for metric in ("left_out", "cut", "own_examples")
    )
    text = (
        "Measured on the user's own data, a fifth of each class held out for the test where it comes without a split; "
        "images are scaled to 32 x 32 pixels, sounds are 40 log-mel bands a frame."
    )
    if left_out:
        text += f" Files and folders left out, as unreadable or of another type: {left_out:.0f}."
    if cut:
        text += f" Recordings of which only the first {OWN_SECONDS:.0f} s are taken: {cut:.0f}."
    if fewest < _FEWEST:
        text += f" Verdicts compare models at {_FEWEST:.0f} training examples, and here are {fewest:.0f}."
    return text


def build_model(arm: str, scale: int, form: Form | None = None) -> nn.Module:
    """The arm's untrained model, for examples of a form; by default that of the built-in set."""
    if arm in SPEECH:
        return speech_model(arm, scale, SPEAKERS if form is None else form)
    return image_model(arm, scale, DIGITS if form is None else form)


def _trained(bench: Bench, size: _Size, task: Task, num: int) -> nn.Module:
    seed, device, known = bench.cell.seed, bench.device, task.known
    steps = size.speech_steps if bench.cell.arm in SPEECH else size.image_steps
    with seeded(seed, "model"):
        model = build_model(bench.cell.arm, size.scale, task.form).to(device)
    few = known.select(choose_labels(known.classes, num, generator(seed, "examples")), device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        batch = few.select(draw_batch(num, size.batch_size, seed, step).to(device), device)
        return nn.functional.cross_entropy(_answer(model, batch), batch.classes)

    train(model, batch_loss, TrainingPlan(steps, plain_recipe(), seed=seed))
    return model


def _answer(model: nn.Module, examples: Examples) -> Tensor:
    inputs, *masks = examples.numbers()
    logits: Tensor = model(inputs, key_mask=masks[0]) if masks else model(inputs)
    return logits


@torch.no_grad()
def correct(model: nn.Module, tested: Examples, device: torch.device) -> list[float]:
    """Whether each example is classified rightly, 1 or 0."""
    right: list[float] = []
    _, *masks = tested.inputs
    num_at_once = max(1, min(_LOOKED_AT, _SCORES_AT_ONCE // masks[0].shape[1] ** 2)) if masks else _LOOKED_AT
    for chosen in torch.arange(len(tested)).split(num_at_once):
        some = tested.select(chosen, device)
        right += (_answer(model, some).argmax(dim=1) == some.classes).double().tolist()
    return right


EXPERIMENT = NoLocalInductiveBias()
