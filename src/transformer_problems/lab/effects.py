"""Paired effects of a treatment against its baseline, and the words for them."""

from dataclasses import dataclass
from typing import Literal

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval
from transformer_problems.lab.results import Results
from transformer_problems.lab.statistics import paired_difference, paired_ratio

At = float | Literal["last"] | None
_LARGEST_RATIO = 10_000  # beyond it, digits say how small the smaller figure is rounded, and no more


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
        against: Slug of the arm compared with, which is then named; None for the treated arm's own baseline.

    Raises:
        ArgumentError: If the words for less and for more are the same, which would hide the direction.
    """

    metric: str
    compare: Literal["ratio", "difference"]
    words: tuple[str, str]
    at: At = None
    where: str = ""
    scale: float = 1.0
    against: str | None = None

    def __post_init__(self) -> None:
        if self.words[0] == self.words[1]:
            raise ArgumentError(
                f"words must differ for less and for more; got {self.words[0]!r} twice. Say which is which."
            )


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


def describe_effect(effect: Effect, interval: Interval, x: float | None, than: str = "") -> str:
    """In words, e.g. "41x (38 to 44) less time at 8,192 tokens", or "no change in time" where no printed digit moved.

    Args:
        than: Label of the arm compared with, said where it is not the experiment's own baseline.
    """
    where = f" {effect.where.format(x=x)}" if effect.where else ""
    less, more = effect.words
    value, low, high = interval.value, interval.low, interval.high
    if effect.compare == "ratio":
        is_less, unit, nothing = value < 1, "x", "1.0"
        if is_less:
            value, low, high = 1 / value, 1 / high, 1 / low
    else:
        is_less, unit, nothing = value < 0, "", "0.00"
        scale = -effect.scale if is_less else effect.scale
        value, (low, high) = scale * value, sorted((scale * low, scale * high))
    texts = [_short(v) for v in (value, low, high)]
    if set(texts) == {nothing}:
        return f"no change{_subject(less, more)}{where}{f' against {than}' if than else ''}"
    if effect.compare == "ratio" and texts[0] == nothing:
        texts = [f"{v:.2f}" for v in (value, low, high)]  # "1.0x more" would not say how little
    if effect.compare == "ratio" and value >= _LARGEST_RATIO:
        texts = [f"over {_LARGEST_RATIO:,}"] * 3
    bounds = "" if texts[1] == texts[2] else f" ({texts[1]} to {texts[2]})"
    return f"{texts[0]}{unit}{bounds} {less if is_less else more}{where}{f' than {than}' if than else ''}"


def _subject(less: str, more: str) -> str:
    """What the words for less and for more have in common, e.g. " in time" of "less time" and "more time"."""
    shared = [word for word in less.split() if word in more.split() and word != "points"]
    return f" in {' '.join(shared)}" if shared else ""


def _short(value: float) -> str:
    """Two digits that count, three from 100 on, without exponents or a negative zero."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    text = f"{value:.1f}" if abs(value) >= 0.995 else f"{value:.2f}"  # what rounds to 1 is written as 1 is
    return text.removeprefix("-") if not text.strip("-0.") else text
