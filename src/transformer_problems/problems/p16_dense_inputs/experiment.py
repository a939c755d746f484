"""What more pixels cost, and what is still seen: images of rising resolution, clips of rising length."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.data.digits import DIGITS_SOURCE, load_digit_images
from transformer_problems.lab.data.moving_images import SPEEDS, moving_digits
from transformer_problems.lab.data.upscaled_digits import upscaled
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.problems.p16_dense_inputs.models import FIRST_TOKENS, NUM_DIGITS, clip_model, image_model

_CLIPS = ("clip_pixels", "tubelets", "tubelets_factorised", "swin_clips")
_IMAGE, _CLIP = (16, 16), (6, 12, 12)  # what the models are trained on
_MOST_STEPS = 8  # times the steps of the baseline that a cheap model may take to spend as many FLOPs

Labelled = tuple[Tensor, Tensor]
"""Inputs [n, 1, ...] and their classes [n]."""


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    image_sides: tuple[int, ...]  # that costs are measured at
    clip_lengths: tuple[int, ...]  # frames of 12 x 12
    width: int
    image_steps: int
    clip_steps: int
    batch_size: int
    num_clips: int  # to learn from; as many as there are images to test on are tested
    seeds: int

    def steps(self, arm: str) -> int:
        return self.clip_steps if arm in _CLIPS else self.image_steps


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((8, 16, 32), (2, 4, 8), 32, 12, 12, batch_size=16, num_clips=1000, seeds=1),
    "standard": _Size((8, 16, 32, 64), (4, 8, 16, 32), 32, 500, 400, batch_size=16, num_clips=2000, seeds=3),
    "full": _Size(
        (8, 16, 32, 64, 128), (4, 8, 16, 32, 64), 128, 5_000, 5_000, batch_size=64, num_clips=20_000, seeds=5
    ),
}


class DenseInputs:
    """Classifiers of digits drawn large, and of digits that move: what a pixel costs, and what accuracy it buys.

    Images are to be told apart by their digit, clips by how fast their digits move."""

    problem = 16
    arms = (
        Arm("pixels", "One token a pixel"),
        Arm("patches", "Patches of 4 x 4", "patch-embedding", lead=True),
        Arm("pyramid", "Pyramid ViT", "hierarchical-vit", lead=True),
        Arm("clip_pixels", "clips: one token a pixel"),
        Arm("tubelets", "clips: tubelets", "tubelet-embedding", lead=True, baseline="clip_pixels"),
        Arm("tubelets_factorised", "clips: tubelets, factorised", "tubelet-embedding", baseline="clip_pixels"),
        Arm("swin", "Swin", "swin", lead=True),
        Arm("swin_clips", "clips: Swin, 3-D windows", "swin", baseline="clip_pixels"),
    )
    chart = Chart(
        metric="flops",
        problem_title="An image, one token a pixel",
        solutions_title="Images and clips, other tokens",
        x_label="pixels of the input",
        y_label="FLOPs of one pass",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("pixels", "patches", "pyramid", "swin", "tubelets"),
    )
    columns = (
        Column("tokens", "tokens at most pixels", at="last", better="lower"),
        Column("flops", "FLOPs at most pixels", at="last", better="lower"),
        Column("flops", "FLOPs grow as pixels to the", better="lower", statistic="exponent"),
        Column("peak_memory_bytes", "bytes at most pixels", at="last", better="lower"),
        Column("accuracy", "right after equal steps", better="higher"),
        Column("accuracy_at_equal_flops", "after as many FLOPs, at most 8x the steps", better="higher"),
    )
    gains = (Effect("flops", "ratio", ("less arithmetic", "more arithmetic"), "last", "at {x:,.0f} pixels"),)
    costs = (
        Effect("accuracy", "difference", ("points fewer right", "points more right"), scale=100),
        Effect(
            "accuracy_at_equal_flops",
            "difference",
            ("points fewer right after up to 8x the steps", "points more right after up to 8x the steps"),
            scale=100,
        ),
        Effect("peak_memory_bytes", "ratio", ("less memory", "more memory"), "last"),
    )
    shared_examples: frozenset[str] = frozenset()

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        yield from _costs(arm, size, bench.device)
        bench.progress(0.2)
        known, tested = examples(arm, size, bench.cell.seed)
        steps = size.steps(arm)
        equal = steps * affordable(arm, size)
        after_steps = correct(_trained(bench, size, known, steps), tested, bench.device)
        bench.progress(0.5)
        after_flops = after_steps
        if equal != steps:
            after_flops = correct(_trained(bench, size, known, equal), tested, bench.device)
        for metric, answers in (("accuracy", after_steps), ("accuracy_at_equal_flops", after_flops)):
            for repeat, right in enumerate(answers):
                yield Measurement(metric, "1", right, repeat=repeat)
        yield Measurement("steps_at_equal_flops", "1", equal)

    def finding(self, results: Results) -> str:
        sides = results.xs("pixels", "flops")
        times = results.mean("pixels", "flops", sides[-1]) / results.mean("pixels", "flops", sides[0])
        accuracy = results.mean("pixels", "accuracy")
        return (
            f"With one token a pixel, {sides[-1] / sides[0]:.0f} times the pixels take "
            f"{times:,.0f} times the arithmetic; trained for as many steps as the others, it tells "
            f"{accuracy:.0%} of images of {_IMAGE[0]} x {_IMAGE[1]} rightly, where chance tells "
            f"{1 / NUM_DIGITS:.0%}."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size, side, (num_frames, *_) = _SIZES[results.scale], _IMAGE[0], _CLIP
        return (
            f"Images are {DIGITS_SOURCE}, drawn larger to {side} x {side}, which shows no more. Clips of {num_frames} "
            f"frames of {_CLIP[1]} x {_CLIP[2]} are made of the same digits in motion, and their speed is asked for.",
            f"Models of images take {size.image_steps} steps and models of clips {size.clip_steps}, of "
            f"{size.batch_size} examples, with AdamW at a peak rate of 0.003. With one token a pixel that is not the "
            f"end of learning: {_left_chance(results)} Points gained are speed of learning; what coarser tokens could "
            "lose is detail, of which digits have little.",
            f"What the FLOPs of the baseline's steps would buy in steps is cut at {_MOST_STEPS} times as many, which "
            "every other arm could more than afford.",
            "FLOPs are counted and the same in every run: the interval of an exponent tells how far the counts are "
            "from one power law.",
        )


def _left_chance(results: Results) -> str:
    """How far the two baselines came, and what that makes of the accuracy that a solution has to hold."""
    said = []
    for arm, kind, chance in (("pixels", "images", 1 / NUM_DIGITS), ("clip_pixels", "clips", 1 / len(SPEEDS))):
        samples = results.samples(arm, "accuracy")
        if samples is not None:
            bar = " and sets hardly a bar" if samples.mean() < 2 * chance else ""
            said.append(f"of {kind} it gets {samples.mean():.0%}, where chance gets {chance:.0%}{bar}")
    return f"{'; '.join(said)}." if said else "neither baseline was measured."


def build_model(arm: str, width: int, shape: tuple[int, ...]) -> nn.Module:
    """The arm's untrained model for inputs of a shape: (height, width), or (frames, height, width)."""
    if arm in _CLIPS:
        num_frames, height, breadth = shape
        return clip_model(arm, width, (num_frames, height, breadth))
    height, breadth = shape
    return image_model(arm, width, (height, breadth))


def _costs(arm: str, size: _Size, device: torch.device) -> Iterator[Measurement]:
    """FLOPs of a pass and peak bytes of a training step, of one input of each size."""
    images, clips = [(side, side) for side in size.image_sides], [(n, *_CLIP[1:]) for n in size.clip_lengths]
    for shape in clips if arm in _CLIPS else images:
        with seeded(0, "costs"):
            model = build_model(arm, size.width, shape).to(device)
        one = torch.rand(1, 1, *shape, generator=generator(0, "costs")).to(device)
        pixels = prod(shape)
        num_frames, side = FIRST_TOKENS[arm]
        yield Measurement("tokens", "1", pixels // (num_frames * side**2), x=pixels, x_unit="pixels")
        yield Measurement("flops", "FLOP", _flops(model, one), x=pixels, x_unit="pixels")

        def step(model: nn.Module = model, one: Tensor = one) -> None:
            model(one).sum().backward()

        yield Measurement("peak_memory_bytes", "B", peak_memory_bytes(step, device=device), x=pixels, x_unit="pixels")


@torch.no_grad()
def _flops(model: nn.Module, one: Tensor) -> int:
    return count_flops(lambda: model(one))


def affordable(arm: str, size: _Size) -> int:
    """How many steps the arm can take for the FLOPs of one of its baseline's, from 1 to eight."""
    shape: tuple[int, ...] = _CLIP if arm in _CLIPS else _IMAGE
    one = torch.zeros(1, 1, *shape)
    ours, theirs = (
        _flops(build_model(name, size.width, shape).eval(), one)
        for name in (arm, "clip_pixels" if arm in _CLIPS else "pixels")
    )
    return max(1, min(_MOST_STEPS, round(theirs / ours)))


def examples(arm: str, size: _Size, seed: int) -> tuple[Labelled, Labelled]:
    """What is learned from and what is tested, made of different images; the tested are always the same."""
    train_images, test_images = load_digit_images()
    if arm not in _CLIPS:
        known, tested = upscaled(train_images, _IMAGE[0]), upscaled(test_images, _IMAGE[0])
        return (known.pixels, known.classes), (tested.pixels, tested.classes)
    num_frames, side = _CLIP[0], _CLIP[1]
    clips, asked = (
        moving_digits(images, num, num_frames=num_frames, size=side, generator=draws)
        for images, num, draws in (
            (train_images, size.num_clips, generator(seed, "clips")),
            (test_images, len(test_images), generator(0, "clips")),
        )
    )
    return (clips.pixels, clips.classes), (asked.pixels, asked.classes)


def _trained(bench: Bench, size: _Size, known: Labelled, steps: int) -> nn.Module:
    seed, device, (inputs, classes) = bench.cell.seed, bench.device, known
    with seeded(seed, "model"):
        model = build_model(bench.cell.arm, size.width, tuple(inputs.shape[2:])).to(device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        chosen = draw_batch(len(classes), size.batch_size, seed, step)
        return nn.functional.cross_entropy(model(inputs[chosen].to(device)), classes[chosen].to(device))

    train(model, batch_loss, TrainingPlan(steps, plain_recipe(), seed=seed))
    return model


@torch.no_grad()
def correct(model: nn.Module, tested: Labelled, device: torch.device) -> list[float]:
    """Whether each input is classified rightly, 1 or 0."""
    answers = torch.cat([model(part.to(device)).argmax(dim=1).cpu() for part in tested[0].split(50)])
    right: list[float] = (answers == tested[1]).double().tolist()
    return right


EXPERIMENT = DenseInputs()
