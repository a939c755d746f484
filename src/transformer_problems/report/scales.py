"""The two axes of a chart: their ends and the ticks that fit."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.ticker import MaxNLocator

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.summaries import Chart, Line, Point, ProblemSummary
from transformer_problems.report.formatting import format_tick, is_bytes
from transformer_problems.report.sheet import text_width

_MARGIN = 0.05  # share of the span left free at each end
_BAND_SHARE = 0.25  # of a logarithmic span that intervals, which may reach to zero, may add at each end
_MOST_MEASURED_TICKS = 16
_TICK_GAP = 0.12  # inches between two tick labels

Kind = Literal["linear", "log", "log rest"]
_WARPS: dict[Kind, Callable[[float], float]] = {
    "linear": float,
    "log": math.log10,
    "log rest": lambda share: -math.log10(1 - share),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis, drawn on a linear one of warped values.

    Args:
        kind: Linear, logarithmic, or for shares logarithmic in what is left of one.
        low: Lower end, warped.
        high: Upper end, warped.
        ticks: The values at which ticks stand.
        labels: What they say.
        floor: On a logarithmic axis, where values of zero and below are drawn; None where there are none.
    """

    kind: Kind
    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    floor: float | None = None

    def place(self, value: float) -> float:
        """Where a value is drawn, warped."""
        if self.kind == "log" and value <= (self.floor or 0.0):
            return self.low if self.floor is None else math.log10(self.floor)
        return _WARPS[self.kind](value)

    def fraction(self, value: float) -> float:
        """Where a value is drawn, as a share of the axis."""
        return (self.place(value) - self.low) / (self.high - self.low)


def drawable(line: Line) -> list[Point]:
    """The points of a line that have a place in a chart: the finite ones."""
    return [point for point in line.points if math.isfinite(point.x) and math.isfinite(point.y.value)]


def has_chart(summary: ProblemSummary) -> bool:
    """Whether anything was measured that a chart can show."""
    return any(drawable(line) for line in summary.lines)


def y_scale(chart: Chart, lines: Iterable[Line]) -> Scale:
    """The y axis that holds every line, and every interval whole if it is linear, most of it if it is logarithmic."""
    estimates = [point.y for line in lines for point in drawable(line)]
    values = [e.value for e in estimates]
    bounds = [b for e in estimates for b in (e.low, e.high) if math.isfinite(b)]
    floor = None
    if chart.y_log:
        positive = [v for v in values if v > 0] or [1.0]
        if len(positive) < len(values):
            floor = 10.0 ** (math.floor(math.log10(min(positive))) - 1)
            positive.append(floor)
        logs = [math.log10(v) for v in positive]
        reach = _BAND_SHARE * ((max(logs) - min(logs)) or 1.0)
        lowest, highest = min(logs) - reach, max(logs) + reach
        low, high = _ends([*logs, *(min(max(math.log10(b), lowest), highest) for b in bounds if b > 0)])
        ticks = (_binary_ticks if is_bytes(chart.metric) else _log_ticks)(10**low, 10**high)
        if floor is not None:
            ticks = [floor, *(t for t in ticks if t > floor * 2)]
        labels = ["0" if t == floor else format_tick(t, chart.metric) for t in ticks]
        return Scale("log", low, high, tuple(ticks), tuple(labels), floor)
    low, high = _ends([*values, *bounds])
    if low < 0 <= min(values):
        low = 0.0
    if chart.y_from is not None:
        low = min(low, chart.y_from)
    ticks = [t for t in _linear_ticks(low, high, 5) if low <= t <= high]
    return Scale("linear", low, high, tuple(ticks), tuple(format_tick(t, chart.metric) for t in ticks))


def x_scale(chart: Chart, lines: Iterable[Line], width: float, size: float) -> Scale:
    """The x axis with as many ticks as fit in `width` inches at `size` points: at round numbers, or where it is not
    linear at what was measured.

    Raises:
        ArgumentError: If an x has no place: zero or below on a logarithmic axis, one or above where shares are drawn.
    """
    xs = sorted({point.x for line in lines for point in drawable(line)})
    if chart.x_log and xs[0] <= 0:
        raise ArgumentError("chart.x_log needs x above 0; got a point at or below 0. Use a linear x axis.")
    if chart.x_log_rest and xs[-1] >= 1:
        raise ArgumentError("chart.x_log_rest needs x below 1; got a point at or above 1. Use a linear x axis.")
    kind: Kind = "log" if chart.x_log else "log rest" if chart.x_log_rest else "linear"
    low, high = _WARPS[kind](xs[0]), _WARPS[kind](xs[-1])
    margin = _MARGIN / 2 * (high - low) or 0.5
    ends = Scale(kind, low - margin, high + margin, (), ())
    ticks = xs
    if kind == "linear" and len(xs) > 1:
        ticks = [t for t in _linear_ticks(xs[0], xs[-1], 5) if ends.low <= t <= ends.high]
    elif kind == "log" and (chart.x_metric or len(xs) > _MOST_MEASURED_TICKS):  # a measured x is no round number
        ticks = [t for t in _log_ticks(10**ends.low, 10**ends.high) if ends.low <= _WARPS[kind](t) <= ends.high]
    kept = _thin(ticks, ends, width, size)
    return Scale(kind, ends.low, ends.high, tuple(kept), tuple(format_tick(t) for t in kept))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = _MARGIN * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    return [round(float(t), 12) for t in MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten (every other one and so on where they are many), with 2 and 5 between where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    step = max(1, math.ceil(decades / 6))
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**e for e in range(first, last + 1, step) for m in multiples]
        ticks = [float(f"{t:.6g}") for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            return ticks
    return [t for t in _linear_ticks(low, high, 5) if low <= t <= high]


def _binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two, for bytes: every other one and so on where they are many, with some between where they are few."""
    first, last = math.floor(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - math.ceil(math.log2(low)) + 1) / 6))
    for multiples in ((1.0,), (1.0, 1.5), (1.0, 1.25, 1.5, 1.75)):
        ticks = [m * 2.0**e for e in range(first, last + 1) if e % step == 0 for m in multiples]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _thin(ticks: Sequence[float], ends: Scale, width: float, size: float) -> list[float]:
    """Ticks whose labels stand clear of each other: every second or third of evenly spaced ones where that will do."""
    for step in (1, 2, 3) if ends.kind != "log rest" else ():
        every = ticks[::-1][::step][::-1]
        if len(every) >= 3 and _clear_of_each_other(every, ends, width, size) == every:
            return every
    return _clear_of_each_other(ticks, ends, width, size)


def _clear_of_each_other(ticks: Sequence[float], ends: Scale, width: float, size: float) -> list[float]:
    kept: list[float] = []
    edge = math.inf
    for value in reversed(ticks):
        half = text_width(format_tick(value), size) / 2
        centre = ends.fraction(value) * width
        if centre + half + _TICK_GAP <= edge:
            kept.append(value)
            edge = centre - half
    return kept[::-1]
