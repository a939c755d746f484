"""How much of the model's arithmetic grows with the square of the length?"""

import math
from collections.abc import Mapping
from dataclasses import replace

from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.lengths import Growth, arithmetic_by_length, longest_input, unit_of
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy

_WINDOW = 256  # these three are sizes to predict with, of the order that their papers try
_SUMMARIES = 256
_FEATURES = 256
_SEGMENTS = 8


class QuadraticCheckup:
    """Counts a pass at short lengths, where the square is told from the rest exactly, and follows both to the longest.

    At a share s, twice the length costs 2 + 2 s times as much, and a token 1 / (1 - s) times what it costs in a short
    text.
    """

    problem = 1
    not_for: Mapping[Kind, str] = {}

    def examine(self, visit: Visit) -> Examination:
        subject = visit.subject
        growth, longest, unit = arithmetic_by_length(visit), longest_input(subject), unit_of(subject)
        share, half = growth.square_share(longest), growth.half_length()
        figures = {"longest_input_" + unit: float(longest), "longest_input_gflop": growth.at(longest) / 1e9}
        if math.isfinite(half):
            figures[f"half_of_the_arithmetic_{unit}"] = half
        if growth.local:
            figures["longest_input_without_windows_gflop"] = _without_windows(growth, longest) / 1e9
            meaning = (
                f"attention is {share:.0%} of the arithmetic at {longest:,} {unit}, where "
                f"{sum(each is not None for each in subject.windows)} of {subject.num_layers} layers look at "
                f"{growth.window:,} of them"
            )
        elif math.isfinite(half):
            meaning = f"attention's square is {share:.0%} of the arithmetic at {longest:,} {unit}, half at {half:,.0f}"
        else:
            meaning = f"the arithmetic grows in proportion to the {unit}: no part of it with their square"
        return Examination(
            {"attention_share": exactly(share)},
            meaning,
            _remedies(subject, growth),
            _curve(growth, longest, unit),
            figures,
        )


def _curve(growth: Growth, longest: int, unit: str) -> Curve:
    lengths = [longest * 2.0**step for step in range(-4, 3)]
    return Curve(
        f"How much of the arithmetic grows with the square of the length (longest input: {longest:,} {unit})",
        unit,
        "share of the arithmetic",
        tuple((length, growth.square_share(length)) for length in lengths),
        x_log=True,
    )


def _remedies(subject: Subject, growth: Growth) -> tuple[Remedy, ...]:
    """Each with the keys that a query meets, or as many as its other products weigh; the square shrinks as they do.

    A query of full attention takes part in two products with each key: a score, and a share of the value. Linformer
    forms its summaries, and Performer its features and their sums, by products as large as those with them, so both
    count twice; Transformer-XL has a score by distance beside each score by content, three products for two.
    """
    longest = longest_input(subject)
    told = (
        ("sparse-attention", 2 * math.sqrt(longest), "a stride of the root of the length"),
        ("longformer", 2 * _WINDOW + 1, f"a window of {_WINDOW} on each side"),
        ("linformer", 2 * _SUMMARIES, f"{_SUMMARIES} summaries, with further training"),
        ("performer", 2 * _FEATURES, f"{_FEATURES} random features"),
        ("transformer-xl", 1.5 * 2 * longest / _SEGMENTS, f"{_SEGMENTS} segments, each with the one before"),
    )
    fitting = [each for each in told if _suits(subject, each[0])]
    found = [_fewer_keys(growth, longest, slug, keys, how) for slug, keys, how in fitting]
    return (*found, _flash(growth, longest, getattr(subject.config, "_attn_implementation", None)))


def _flash(growth: Growth, longest: int, implementation: str | None) -> Remedy:
    """Its kernels leave out what a window hides, which all others compute and mask."""
    if growth.local and "flash" not in str(implementation):
        times = _without_windows(growth, longest) / growth.at(longest)
        told = f"{times:.1f}x less arithmetic than with {implementation}, which computes what windows hide"
        return Remedy("flash-attention", told, times)
    flash = "no fewer operations, but no scores in memory"
    return Remedy("flash-attention", flash if implementation == "eager" else f"in use already ({implementation})")


def _without_windows(growth: Growth, length: float) -> float:
    return replace(growth, window=math.inf).at(length)


def _suits(subject: Subject, slug: str) -> bool:
    """Linformer mixes past and future; a window in one dimension, or a memory of text, is no part of an image."""
    if subject.kind == "causal":
        return slug != "linformer"
    return slug != "transformer-xl" and (subject.kind == "encoder" or slug != "longformer")


def _fewer_keys(growth: Growth, longest: int, slug: str, keys: float, how: str) -> Remedy:
    scores = growth.scores(longest)
    full = (growth.square + growth.local) * longest**2  # as if each token met all
    met = longest * scores / full if full else 0.0
    square, rest = scores * min(1.0, keys / met) if met else 0.0, growth.at(longest) - scores
    after = square / (square + rest)
    before = growth.square_share(longest)
    if keys >= met or not before:
        return Remedy(slug, f"nothing at this length ({how})")
    times = growth.at(longest) / (square + rest)
    return Remedy(slug, f"{before:.0%} to {after:.0%}, {times:.1f}x less arithmetic in all: {how}", before / after)


CHECKUP = QuadraticCheckup()
