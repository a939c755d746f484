"""What the records of a training monitor mean: what goes wrong, since when, and which solutions treat it."""

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import NamedTuple

from transformer_problems.core.arguments import require_positive, require_share
from transformer_problems.solutions.training.monitor_layers import LayerRecord

_FEW = 3  # earlier samples without which a median says little


@dataclass(frozen=True, slots=True)
class AlarmThresholds:
    """Where alarms begin. Where no paper gives a number, it is chosen so that common healthy training stays silent.

    Args:
        gradient_growth: "exploding gradients": a layer's gradient norm over the median of its earlier samples, of
            which there must be three. Our choice: noise between batches stays within one order, this is two.
        gradient_decay: "vanishing gradients": a first layer's gradient norm over the last layer's. Our choice: two
            orders, more than post-norm stacks lose (Xiong et al. 2020, arXiv:2002.04745, section 3.3), while stacks
            without skips lose them within a few layers.
        entropy_share: "entropy collapse": mean attention entropy over its maximum. Zhai et al. 2023, arXiv:2303.06296,
            find that training diverges as entropy nears zero; at 0.02 a query of 1,000 keys gives one of them some 98%.
        largest_logit: "logit growth": Dehghani et al. 2023, arXiv:2302.05442, and Wortsman et al. 2023,
            arXiv:2309.14322, find that logits grow without bound before attention turns one-hot and training
            diverges; models are trained with logits held below 50 (Gemma 2, arXiv:2408.00118) or 100 (Kimi K2,
            arXiv:2507.20534).
        logit_growth: What the largest logit must be over the layer's first sample besides, so that a pretrained model
            whose logits are large and stay so is left alone. Our choice.
        token_similarity: "rank collapse", in the later half of the layers: without skips the tokens converge to one
            (Dong et al. 2021, arXiv:2103.03404), and then gradients of queries and keys vanish (Noci et al. 2022,
            arXiv:2206.03126). Our choice of number. A pretrained model with a few huge dimensions, as GPT-2, comes
            near it in health.
        update_ratio: "update too large": the rule of thumb is 1e-3, which layer-wise rates enforce (You et al. 2017,
            arXiv:1708.03888); this is a hundred times as much. Adam's first steps without warmup stay below it too.

    Raises:
        ArgumentError: If a threshold is not positive, or one of a share lies beyond 1.
    """

    gradient_growth: float = 100.0
    gradient_decay: float = 0.01
    entropy_share: float = 0.02
    largest_logit: float = 100.0
    logit_growth: float = 2.0
    token_similarity: float = 0.99
    update_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_positive(
            gradient_growth=self.gradient_growth,
            largest_logit=self.largest_logit,
            logit_growth=self.logit_growth,
            update_ratio=self.update_ratio,
        )
        require_share(
            gradient_decay=self.gradient_decay,
            entropy_share=self.entropy_share,
            token_similarity=self.token_similarity,
        )


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that goes wrong in training.

    Args:
        kind: Its name, e.g. "entropy collapse".
        layers: Where it was first seen.
        step: When it was first seen.
        num_samples: Sampled steps that show it, in any layer: a spike has one, a lasting fault has many.
        measured: The worst of those layers' figures at that step.
        threshold: Where the alarm begins; None where any finite number is fine.
        sentence: What is wrong, in plain words.
        solutions: Slugs of what treats it, for `transformer-problems show`.
    """

    kind: str
    layers: tuple[str, ...]
    step: int
    num_samples: int
    measured: float
    threshold: float | None
    sentence: str
    solutions: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.layers) - 1} more" if len(self.layers) > 1 else ""
        samples = "1 sample" if self.num_samples == 1 else f"{self.num_samples} samples"
        limit = "" if self.threshold is None else f", alarm at {self.threshold:.3g}"
        return (
            f"{self.kind} at step {self.step} in {self.layers[0]}{more}, seen in {samples}: {self.sentence} "
            f"Measured {self.measured:.3g}{limit}. Try {', '.join(self.solutions)}."
        )


def find_alarms(records: Sequence[LayerRecord], thresholds: AlarmThresholds) -> list[Alarm]:
    """What went wrong, in the order in which it was first seen.

    Args:
        records: By step, and within a step by depth.
    """
    samples = [list(sample) for _, sample in groupby(records, key=lambda record: record.step)]
    alarms = []
    for rule in _RULES:
        findings = list(rule.find(samples, thresholds))
        if not findings:
            continue
        first = [finding for finding in findings if finding.step == findings[0].step]
        alarms.append(
            Alarm(
                rule.kind,
                layers=tuple(finding.layer for finding in first),
                step=first[0].step,
                num_samples=len({finding.step for finding in findings}),
                measured=rule.worst(finding.measured for finding in first),
                threshold=None if rule.threshold is None else getattr(thresholds, rule.threshold),
                sentence=rule.sentence,
                solutions=rule.solutions,
            )
        )
    return sorted(alarms, key=lambda alarm: alarm.step)


_Samples = list[list[LayerRecord]]


class _Finding(NamedTuple):
    step: int
    layer: str
    measured: float


def _growing_gradients(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    earlier: dict[str, list[float]] = {}  # sorted, so that each median is cheap
    for record in (record for sample in samples for record in sample):
        norm, past = record.gradient_norm, earlier.setdefault(record.layer, [])
        if norm is None or not math.isfinite(norm):
            continue
        if len(past) >= _FEW and norm > thresholds.gradient_growth * median(past) > 0:
            yield _Finding(record.step, record.layer, norm / median(past))
        insort(past, norm)


def _broken_gradients(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    for record in (record for sample in samples for record in sample):
        if record.gradient_norm is not None and not math.isfinite(record.gradient_norm):
            yield _Finding(record.step, record.layer, record.gradient_norm)


def _vanishing_gradients(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    for sample in samples:
        norms = [(r.layer, r.gradient_norm) for r in sample if r.gradient_norm is not None]
        norms = [(layer, norm) for layer, norm in norms if math.isfinite(norm)]
        for layer, norm in norms:
            if not norm < thresholds.gradient_decay * norms[-1][1]:
                break  # only what is small from the first layer on is lost on the way back
            yield _Finding(sample[0].step, layer, norm / norms[-1][1])


def _collapsed_entropy(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    for record in (record for sample in samples for record in sample):
        share = record.attention_entropy_share
        if share is not None and share < thresholds.entropy_share:
            yield _Finding(record.step, record.layer, share)


def _growing_logits(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    first: dict[str, float] = {}
    for record in (record for sample in samples for record in sample):
        logit = record.largest_logit
        if logit is None:
            continue
        grown = logit >= thresholds.logit_growth * first.setdefault(record.layer, logit)
        if grown and logit > thresholds.largest_logit:
            yield _Finding(record.step, record.layer, logit)


def _collapsed_tokens(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    for record in (record for sample in samples for record in sample[len(sample) // 2 :]):
        similarity = record.token_similarity
        if similarity is not None and similarity > thresholds.token_similarity:
            yield _Finding(record.step, record.layer, similarity)


def _large_updates(samples: _Samples, thresholds: AlarmThresholds) -> Iterator[_Finding]:
    for record in (record for sample in samples for record in sample):
        ratio = record.update_ratio
        if ratio is not None and ratio > thresholds.update_ratio:
            yield _Finding(record.step, record.layer, ratio)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How an alarm is found and what it says; `threshold` names its number in AlarmThresholds."""

    kind: str
    find: Callable[[_Samples, AlarmThresholds], Iterator[_Finding]]
    threshold: str | None
    worst: Callable[[Iterator[float]], float]
    sentence: str
    solutions: tuple[str, ...]


_RULES = (
    _Rule(
        "exploding gradients",
        _growing_gradients,
        "gradient_growth",
        max,
        "the gradient is that many times its earlier median, and one such step can undo what was learned. Lower the "
        "learning rate first.",
        ("gradient-clipping", "pre-layernorm", "learning-rate-warmup"),
    ),
    _Rule(
        "numbers that are not finite",
        _broken_gradients,
        None,
        max,
        "the gradient holds such numbers, and the step makes the weights so. Look for them in the batch, and lower the "
        "learning rate.",
        ("learning-rate-warmup",),
    ),
    _Rule(
        "vanishing gradients",
        _vanishing_gradients,
        "gradient_decay",
        min,
        "the gradient is that small a part of the last layer's, so these first layers hardly learn.",
        ("pre-layernorm", "residual-scaling", "skip-connections"),
    ),
    _Rule(
        "entropy collapse",
        _collapsed_entropy,
        "entropy_share",
        min,
        "attention puts nearly all weight on single tokens; measured is its entropy's share of the maximum.",
        ("attention-temperature-control",),
    ),
    _Rule(
        "logit growth",
        _growing_logits,
        "largest_logit",
        max,
        "the largest attention logit grows out of bounds; attention turns one-hot and passes no gradient.",
        ("attention-temperature-control",),
    ),
    _Rule(
        "rank collapse",
        _collapsed_tokens,
        "token_similarity",
        max,
        "the tokens of an example have become nearly the same; measured is their mean cosine.",
        ("skip-connections", "residual-scaling"),
    ),
    _Rule(
        "update too large",
        _large_updates,
        "update_ratio",
        max,
        "one step changes that share of the layer's weights; about 0.001 is usual. Lower the learning rate first.",
        ("learning-rate-warmup", "adamw"),
    ),
)
