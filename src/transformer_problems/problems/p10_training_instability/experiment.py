"""A deep model trained at learning rates over three decades: which of them work, with which remedy."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import DivergedError
from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, train
from transformer_problems.models.block import FeedForward
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.post_norm import PostNorm
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.clipping import GradientClipping
from transformer_problems.solutions.training.monitor_statistics import AttentionReader, attention_readers
from transformer_problems.solutions.training.recipe import OptimizerFactory, TrainingRecipe
from transformer_problems.solutions.training.warmup import Warmup

_HEADS = 2
_LENGTH = 48
_VOCAB_SIZE = 256
_WARMUP_STEPS = 30
_DECAY = 0.01  # of the weights: AdamW's, and the L2 penalty it is compared with
_SPIKE_EVERY, _SPIKE = 20, 1000.0  # a planted bad batch: its gradient is this many times too large
_NAMES = {"post_norm": "the baseline", "pre_norm": "pre-norm", "all": "all four together"}
_PRE_NORM = {"pre_norm", "all"}
_SPIKED = {"spiked", "clip_norm", "clip_value", "clip_adaptive"}
_CLIPPING = {
    "clip_norm": GradientClipping(1.0),
    "clip_value": GradientClipping(0.1, "value"),
    "clip_adaptive": GradientClipping(0.05, "adaptive"),
    "clip_unspiked": GradientClipping(1.0),
    "all": GradientClipping(1.0),
}


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    rates: tuple[float, ...]  # learning rates, three decades of them
    width: int
    layers: int
    steps: int
    batch_size: int
    num_windows: int  # held-out texts
    seeds: int


def _decades(low: int, high: int, per_decade: int) -> tuple[float, ...]:
    """Rates from 10^low to 10^high, evenly spaced in their logarithm."""
    return tuple(10.0 ** (low + i / per_decade) for i in range((high - low) * per_decade + 1))


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(_decades(-4, -1, 1), 32, 6, steps=36, batch_size=8, num_windows=16, seeds=1),
    "standard": _Size(_decades(-4, -1, 2), 32, 6, steps=200, batch_size=8, num_windows=64, seeds=3),
    "full": _Size(_decades(-5, -1, 3), 256, 24, steps=5_000, batch_size=64, num_windows=512, seeds=5),
}


def build_model(arm: str, width: int, layers: int) -> Decoder:
    """A deep decoder with Xavier's initial weights, as in the paper; the arm decides where the norms stand."""

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, position=RotaryEmbedding(width // _HEADS))

    model = Decoder(_VOCAB_SIZE, width, layers, mixer, residual=PreNorm if arm in _PRE_NORM else PostNorm)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
    return model


def recipe(arm: str, learning_rate: float) -> TrainingRecipe:
    """Plain Adam at one rate, but for what the arm changes."""
    optimizers: dict[str, Callable[[], OptimizerFactory]] = {
        "adam_l2": lambda: adam(learning_rate, l2=_DECAY),
        "adamw": lambda: adamw(learning_rate, weight_decay=_DECAY),
        "all": lambda: adamw(learning_rate, weight_decay=_DECAY),
    }
    plain = TrainingRecipe(optimizers.get(arm, lambda: adam(learning_rate))())
    schedule = Warmup(_WARMUP_STEPS, "constant") if arm in ("warmup", "all") else plain.schedule
    return TrainingRecipe(plain.optimizer, schedule=schedule, clipping=_CLIPPING.get(arm, plain.clipping))


class TrainingInstability:
    """A deep post-norm language model on real text, trained by plain Adam at each of many learning rates."""

    problem = 10
    arms = (
        Arm("post_norm", "Post-norm, plain Adam"),
        Arm("spiked", "the same, with planted spikes"),
        Arm("adam_l2", "Adam + L2"),
        Arm("pre_norm", "Pre-norm", "pre-layernorm", lead=True),
        Arm("warmup", "Warmup", "learning-rate-warmup", lead=True),
        Arm("adamw", "AdamW", "adamw", lead=True, baseline="adam_l2"),
        Arm("clip_norm", "Clipping by norm, spikes", "gradient-clipping", lead=True, baseline="spiked"),
        Arm("clip_value", "Clipping by value, spikes", "gradient-clipping", baseline="spiked"),
        Arm("clip_adaptive", "Adaptive clipping, spikes", "gradient-clipping", baseline="spiked"),
        Arm("clip_unspiked", "Clipping by norm, no spikes", "gradient-clipping"),
        Arm("all", "all four together"),
    )
    chart = Chart(
        metric="bits_per_byte",
        problem_title="Deep post-norm model, plain Adam",
        solutions_title="The same with each remedy",
        x_label="learning rate",
        y_label="held-out bits per byte",
        better="lower",
        x_log=True,
        draws=("post_norm", "spiked", "pre_norm", "warmup", "adamw", "clip_norm", "all"),
    )
    columns = (
        Column("learning_rate_sensitivity", "sensitivity, bits", better="lower"),
        Column("best_bits_per_byte", "bits/byte at the best rate", better="lower"),
        Column("mean_bits_per_byte", "bits/byte, mean over rates", better="lower"),
        Column("diverged_share", "runs diverged", better="lower", digits=2),
        Column("gradient_growth", "gradient, last layer / first", digits=2),
        Column("largest_logit", "largest attention logit", digits=2),
    )
    gains = (
        Effect(
            "learning_rate_sensitivity", "ratio", ("less learning-rate sensitivity", "more learning-rate sensitivity")
        ),
    )
    costs = (
        Effect(
            "best_bits_per_byte", "difference", ("bits/byte less at the best rate", "bits/byte more at the best rate")
        ),
        Effect("mean_bits_per_byte", "difference", ("bits/byte less on average", "bits/byte more on average")),
        Effect("diverged_share", "difference", ("points fewer diverged runs", "points more diverged runs"), scale=100),
    )
    shared_examples: frozenset[str] = frozenset()

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm, seed = _SIZES[bench.cell.scale], bench.cell.arm, bench.cell.seed
        text = load_text()
        held_out = held_out_windows(text.test, num=size.num_windows, length=_LENGTH + 1)
        untrained = _new_model(arm, size, seed).to(bench.device)
        start = held_out_bits(untrained, held_out, bench.device)
        yield from gradients_at_start(untrained, _batch(text, size, seed, 0).to(bench.device))
        losses, logits, num_diverged = [], [], 0
        for i, rate in enumerate(size.rates):
            loss, logit = _train_at(rate, bench, size, text, held_out)
            num_diverged += loss >= start
            losses.append(min(loss, start))
            logits.append(logit)
            yield Measurement("bits_per_byte", "bit", losses[-1], x=rate, x_unit="learning rate")
            bench.progress((i + 1) / len(size.rates))
        best = min(losses)
        yield Measurement("best_bits_per_byte", "bit", best)
        yield Measurement("learning_rate_sensitivity", "bit", sum(losses) / len(losses) - best)
        yield Measurement("mean_bits_per_byte", "bit", sum(losses) / len(losses))
        yield Measurement("diverged_share", "1", num_diverged / len(losses))
        yield Measurement("largest_logit", "1", max(logits))

    def finding(self, results: Results) -> str:
        rates = results.xs("post_norm", "bits_per_byte")
        curve = {rate: results.samples("post_norm", "bits_per_byte", rate) for rate in rates}
        means = {rate: float(samples.mean()) for rate, samples in curve.items() if samples is not None}
        best, growth = min(means, key=lambda rate: means[rate]), results.samples("post_norm", "gradient_growth")
        assert growth is not None
        diverged = results.samples("post_norm", "diverged_share")
        assert diverged is not None
        return (
            f"A deep post-norm model under plain Adam ends at {means[best]:.2f} bits per byte with a learning rate "
            f"of {best:.2g}, and at {means[rates[-1]]:.2f} with {rates[-1]:.2g}; {diverged.mean():.0%} of its runs "
            f"diverge. Before training, the gradient of its last layer is {growth.mean():.1f} times that of its first."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES["standard"]
        told = [
            f"At standard scale, deep means {size.layers} layers of width {size.width}, trained for {size.steps} steps "
            f"of {size.batch_size} windows of {_LENGTH} bytes: too few for the lowest rates.",
            f"A planted spike is a bad batch: the loss of every {_SPIKE_EVERY}th step times {_SPIKE:,.0f}.",
            "A run has diverged where it ends at a loss that is not finite, or not below that of the untrained model. "
            "Of such a model the loss is above 8 bits, since its guesses are worse than uniform ones.",
        ]
        above = {arm: excess_above_best(results, arm) for arm in ("post_norm", "pre_norm", "all")}
        if all(excess is not None for excess in above.values()):
            told.append(
                "Sensitivity counts rates that are too low for so few steps as well as those that are too high. Of the "
                "excess over the best loss, the mean over rates above the best one is "
                + ", ".join(f"{excess:.2f} bits for {_NAMES[arm]}" for arm, excess in above.items())
                + "."
            )
        told.append(
            f"AdamW's decay of {_DECAY} takes {_DECAY * 1e-3 * size.steps:.1%} of the weights away in {size.steps} "
            "steps at a rate of 0.001, which is next to nothing: the verdict compares Adam without decay with Adam "
            "under an L2 penalty of the same figure. Losses are reported beside it."
        )
        return tuple(told)


def excess_above_best(results: Results, arm: str) -> float | None:
    """Mean excess over the arm's own best loss at the rates above its best one, bits; None where nothing was measured.

    The mean is over seeds, each with its own best rate; a seed whose best rate is the highest has none.
    """
    rates = results.xs(arm, "bits_per_byte")
    curves = [results.samples(arm, "bits_per_byte", rate) for rate in rates]
    measured = [curve[:, 0] for curve in curves if curve is not None]
    if not measured:
        return None
    losses = np.stack(measured, axis=1)  # [seeds, rates]
    excess = losses - losses.min(axis=1, keepdims=True)
    above = np.arange(losses.shape[1]) > losses.argmin(axis=1)[:, None]
    return float((excess * above).sum(axis=1).mean() / len(rates))


def _new_model(arm: str, size: _Size, seed: int) -> Decoder:
    with seeded(seed, "model"):
        return build_model(arm, size.width, size.layers)


def _batch(text: TextSplits, size: _Size, seed: int, step: int) -> Tensor:
    return sample_windows(text.train, num=size.batch_size, length=_LENGTH + 1, generator=generator(seed, "batch", step))


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte, in nats. windows: [B, N + 1]."""
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _train_at(rate: float, bench: Bench, size: _Size, text: TextSplits, held_out: Tensor) -> tuple[float, float]:
    """Held-out bits per byte after training at a rate, infinite if it diverged, and the largest attention logit,
    which a diverged model no longer tells."""
    arm, seed = bench.cell.arm, bench.cell.seed
    model = _new_model(arm, size, seed).to(bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        loss = next_byte_loss(model, _batch(text, size, seed, step).to(bench.device))
        is_spike = arm in _SPIKED and step % _SPIKE_EVERY == _SPIKE_EVERY - 1
        return _SPIKE * loss if is_spike else loss

    try:
        train(model, batch_loss, TrainingPlan(size.steps, recipe(arm, rate)))
    except DivergedError:
        return math.inf, 0.0
    return held_out_bits(model, held_out, bench.device), largest_logit(model, held_out.to(bench.device))


def held_out_bits(model: nn.Module, windows: Tensor, device: torch.device) -> float:
    """Bits per byte over all windows; infinite where the model gives no finite figure."""
    windows = windows.to(device)
    with torch.no_grad():
        bits = float(bits_per_byte(model(windows[:, :-1]), windows[:, 1:]).mean())
    return bits if math.isfinite(bits) else math.inf


def largest_logit(model: nn.Module, windows: Tensor) -> float:
    """The largest attention score, before the softmax, in any layer. windows: [B, N + 1]."""
    found: list[float] = []
    with ExitStack() as hooks:
        for op, read in attention_readers(model):

            def look(module: nn.Module, inputs: Any, keywords: Any, read: AttentionReader = read) -> None:
                statistics = read(*inputs, **keywords)
                assert statistics is not None, "a token always sees itself"
                found.append(statistics.largest_logit)

            hooks.enter_context(op.register_forward_pre_hook(look, with_kwargs=True))
        with torch.no_grad():
            model(windows[:, :-1])
    return max(found)


def gradients_at_start(model: Decoder, windows: Tensor) -> Iterator[Measurement]:
    """The gradient's norm in the second matrix of each layer's feed-forward network, before any step.

    Source:
        Xiong et al. 2020, arXiv:2002.04745, section 3.3 and figure 3.
    """
    next_byte_loss(model, windows).backward()
    norms = []
    for i, block in enumerate(model.body.blocks):
        assert isinstance(block.feed_forward, FeedForward)
        gradient = block.feed_forward.down.weight.grad
        assert gradient is not None
        norms.append(float(gradient.norm()))
        yield Measurement("gradient_norm", "1", norms[-1], x=i + 1, x_unit="layers")
    yield Measurement("gradient_growth", "1", norms[-1] / norms[0])


EXPERIMENT = TrainingInstability()
