"""Paired effects of a treatment against its baseline, and the words for them."""

from dataclasses import dataclass
from typing import Literal

from transformer_problems.core.records import Interval
from transformer_problems.lab.results import Results
from transformer_problems.lab.statistics import paired_difference, paired_ratio

At = float | Literal["last"] | None


@dataclass(frozen=True, slots=True)
class Effect:
    """A paired comparison with the baseline and the words for it.

    Args:
        metric: What is compared.
        compare: "ratio" or "difference" of treated to baseline.
        words: For less and for more, e.g. ("less time", "more time").
        at: The x compared at; "last" is the largest x that both arms have.
        where: Said after the figure, with the x filled in, e.g. "at {x:,.0f} tokens".
        scale: Factor on a difference before it is printed, e.g. 100 for points of a percentage.
    """

    metric: str
    compare: Literal["ratio", "difference"]
    words: tuple[str, str]
    at: At = None
    where: str = ""
    scale: float = 1.0


def common_x(results: Results, arm: str, baseline: str, metric: str, at: At) -> float | None:
    """The x that `at` stands for: itself, or the largest one that both arms have."""
    if at != "last":
        return at
    shared = set(results.xs(arm, metric)) & set(results.xs(baseline, metric))
    return max(shared, default=None)


def measure_effect(
    results: Results, arm: str, baseline: str, metric: str, compare: Literal["ratio", "difference"], x: float | None
) -> Interval | None:
    """Treated over baseline, or treated minus baseline; None where the two share no samples."""
    pair = results.paired(arm, baseline, metric, x)
    if pair is None:
        return None
    treated, untreated = pair
    return paired_ratio(untreated, treated) if compare == "ratio" else paired_difference(untreated, treated)


def describe_effect(effect: Effect, interval: Interval, x: float | None) -> str:
    """In words, e.g. "41x (38 to 44) less time at 8,192 tokens"."""
    where = f" {effect.where.format(x=x)}" if effect.where else ""
    less, more = effect.words
    if effect.compare == "ratio":
        return _describe_ratio(interval, less, more) + where
    value, low, high = (effect.scale * v for v in (interval.value, interval.low, interval.high))
    word = less if value < 0 else more
    sign, bounds = (-1, (-high, -low)) if value < 0 else (1, (low, high))
    return f"{_short(sign * value)}{_between(*bounds)} {word}{where}"


def _describe_ratio(interval: Interval, less: str, more: str) -> str:
    if interval.value < 1:
        return f"{_short(1 / interval.value)}x{_between(1 / interval.high, 1 / interval.low)} {less}"
    return f"{_short(interval.value)}x{_between(interval.low, interval.high)} {more}"


def _between(low: float, high: float) -> str:
    return "" if _short(low) == _short(high) else f" ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    """Two digits that count, three from 100 on, without exponents or a negative zero."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    text = f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"
    return text.removeprefix("-") if not text.strip("-0.") else text
