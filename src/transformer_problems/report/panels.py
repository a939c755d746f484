"""The two panels of a problem's picture: the baseline alone, then every solution on the same y axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.summaries import Chart, Line, Point, ProblemSummary
from transformer_problems.report.colours import MUTED, RULE, Stroke
from transformer_problems.report.labels import spread
from transformer_problems.report.scales import Scale, drawable, x_scale, y_scale
from transformer_problems.report.sheet import Sheet, balance, line_height, text_width, wrap

HEADING, SMALL, LABEL = 9.5, 8.0, 8.4
_LABEL_WIDTH, _LEADER, _BETWEEN = 1.55, 0.26, 0.34
_LOWEST, _ABOVE_TICKS, _LABEL_SLACK = 2.55, 0.07, 0.03
_CLEAR = 0.06  # inches between the baseline's label and its curve
_ONE_PLACE = 0.045  # inches, a dot's width: lines that end closer than this end at one place
_MOST_DOTS = 24
_BETTER = {"lower": "↓ lower is better", "higher": "↑ higher is better"}


@dataclass(frozen=True, slots=True)
class Panels:
    """Everything about the panels that is decided before a sheet exists; sizes in inches."""

    chart: Chart
    baseline: Line | None  # None where it could not be measured
    lines: tuple[Line, ...]
    strokes: Mapping[str, Stroke]
    xs: tuple[Scale, Scale]  # of the baseline alone, and of every line
    y: Scale
    labels: tuple[tuple[str, ...], ...]
    left: float
    plot_width: float
    plot_height: float
    headings: tuple[tuple[str, ...], tuple[str, ...]]
    captions: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def head_height(self) -> float:
        return (
            max(map(len, self.headings)) * line_height(HEADING)
            + max(map(len, self.captions)) * line_height(SMALL)
            + 0.1
        )

    @property
    def height(self) -> float:
        return self.head_height + self.plot_height + _ABOVE_TICKS + 2 * line_height(SMALL) + 0.02


def plan(summary: ProblemSummary, strokes: Mapping[str, Stroke], left: float, width: float) -> Panels:
    """Decides which lines are drawn, on which axes, and how much room they need.

    Raises:
        ArgumentError: If there is nothing to draw, or an x has no place on its axis.
    """
    chart = summary.chart
    first = summary.rows[0].arm.slug
    lines = tuple(
        line for line in summary.lines if drawable(line) and (not chart.draws or line.arm.slug in (first, *chart.draws))
    )
    if not lines:
        raise ArgumentError("lines must hold a finite point; got none. Measure the problem before drawing it.")
    y = y_scale(chart, lines)
    labels = tuple(tuple(wrap(line.arm.label, LABEL, _LABEL_WIDTH)) for line in lines)
    label_width = max(text_width(text, LABEL) for label in labels for text in label)
    tick_width = max((text_width(text, SMALL) for text in y.labels), default=0.0) + 0.08
    plot_width = (width - tick_width - _BETWEEN - _LEADER - label_width) / 2
    baseline = next((line for line in lines if line.arm.slug == first), None)
    x = x_scale(chart, lines, plot_width, SMALL)
    wide = plot_width + _LEADER + label_width
    return Panels(
        chart=chart,
        baseline=baseline,
        lines=lines,
        strokes=strokes,
        xs=(x if baseline is None else x_scale(chart, (baseline,), plot_width, SMALL), x),
        y=y,
        labels=labels,
        left=left + tick_width,
        plot_width=plot_width,
        plot_height=max(_LOWEST, sum(map(_label_height, labels)) - 0.1),
        headings=(
            tuple(balance(chart.problem_title, HEADING, plot_width + tick_width, "bold")),
            tuple(balance(chart.solutions_title, HEADING, wide, "bold")),
        ),
        captions=(tuple(wrap(chart.y_label, SMALL, plot_width + tick_width)), (_BETTER[chart.better],)),
    )


def draw(panels: Panels, sheet: Sheet, top: float, left_edge: float) -> None:
    """Draws both panels with their upper edge at `top`; texts on the left start at `left_edge`."""
    right = panels.left + panels.plot_width + _BETWEEN
    for side, x in enumerate((left_edge, right)):
        sheet.lines(x, top, panels.headings[side], size=HEADING, weight="bold")
        caption_top = top + max(map(len, panels.headings)) * line_height(HEADING) + 0.02
        sheet.lines(x, caption_top, panels.captions[side], size=SMALL, colour=MUTED)
    plot_top = top + panels.head_height
    for side, x in enumerate((panels.left, right)):
        axes = sheet.axes(x, plot_top, panels.plot_width, panels.plot_height)
        _dress(axes, panels, panels.xs[side], sheet, x, plot_top, with_y_labels=side == 0)
        shown = panels.lines if side else (panels.baseline,)
        for line in shown:
            if line is not None:
                _draw_line(axes, line, panels, panels.xs[side], emphasis=side == 0)
    if panels.baseline is None:
        middle = panels.left + panels.plot_width / 2, plot_top + panels.plot_height / 2
        sheet.text(*middle, "not measured", size=HEADING, colour=MUTED, align="center", anchor="center", opaque=True)
    else:
        _label_baseline(panels.baseline, panels, sheet, plot_top)
    _label_ends(panels, sheet, right, plot_top)


def _dress(
    axes: Axes, panels: Panels, across: Scale, sheet: Sheet, x: float, top: float, *, with_y_labels: bool
) -> None:
    """Ends, grid and ticks; tick labels are the sheet's own text, so that their place is known."""
    axes.set(xlim=(across.low, across.high), ylim=(panels.y.low, panels.y.high))
    axes.set_xticks([across.place(t) for t in across.ticks], labels=[""] * len(across.ticks))
    axes.set_yticks([panels.y.place(t) for t in panels.y.ticks], labels=[""] * len(panels.y.ticks))
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=3, width=0.6, color=MUTED)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=MUTED, linewidth=0.6)
    bottom = top + panels.plot_height
    for value, text in zip(across.ticks, across.labels, strict=True):
        at = x + across.fraction(value) * panels.plot_width
        sheet.text(at, bottom + _ABOVE_TICKS, text, size=SMALL, colour=MUTED, align="center")
    below = bottom + _ABOVE_TICKS + line_height(SMALL)
    sheet.text(x + panels.plot_width / 2, below, panels.chart.x_label, size=SMALL, colour=MUTED, align="center")
    if with_y_labels:
        for value, text in zip(panels.y.ticks, panels.y.labels, strict=True):
            at = bottom - panels.y.fraction(value) * panels.plot_height
            sheet.text(x - 0.06, at, text, size=SMALL, colour=MUTED, align="right", anchor="center")


def _draw_line(axes: Axes, line: Line, panels: Panels, across: Scale, *, emphasis: bool) -> None:
    stroke, points = panels.strokes[line.arm.slug], drawable(line)
    order = 4 if line.arm.lead else 3  # leading arms lie on top of variants and controls
    xs = [across.place(point.x) for point in points]
    ys, lows, highs = (
        [panels.y.place(value) for value in column]
        for column in zip(*((p.y.value, p.y.low, p.y.high) for p in points), strict=True)
    )
    if len(points) == 1:
        axes.plot(xs * 2, [lows[0], highs[0]], color=stroke.line, linewidth=1.2, zorder=order)
    else:
        axes.fill_between(xs, lows, highs, color=stroke.line, alpha=0.16, linewidth=0, zorder=2)
    axes.plot(
        xs,
        ys,
        color=stroke.line,
        linestyle=(0, stroke.dashes) if stroke.dashes else "-",
        linewidth=2.0 if emphasis else 1.5,
        marker="o" if len(points) <= _MOST_DOTS else "",
        markersize=4.2 if emphasis else 3.2,
        markeredgewidth=0,
        zorder=order,
        clip_on=False,
    )


def _label_ends(panels: Panels, sheet: Sheet, x: float, top: float) -> None:
    """The right panel's labels, spread beside the ends of their lines and tied to them by thin leaders. Lines that end
    at one place share one leader, which leads to a bracket around their labels."""
    ends = [drawable(line)[-1] for line in panels.lines]
    wishes = [panels.y.fraction(end.y.value) * panels.plot_height for end in ends]
    groups = _at_one_place(ends, wishes)
    heights = [sum(_label_height(panels.labels[i]) for i in group) for group in groups]
    places = [sum(wishes[i] for i in group) / len(group) for group in groups]
    slack = max(0.1, (sum(heights) - panels.plot_height) / 2 + 1e-6)
    centres = spread(places, heights, -slack, panels.plot_height + slack)
    bottom, edge = top + panels.plot_height, x + panels.plot_width + _LEADER
    for group, height, place, centre in zip(groups, heights, places, centres, strict=True):
        strokes = [panels.strokes[panels.lines[i].arm.slug] for i in group]
        start = x + panels.xs[1].fraction(ends[group[0]].x) * panels.plot_width
        reach = height / 2 - 0.03 if len(group) > 1 else 0.0  # of the bracket; a single label has none
        colour = strokes[0].line if len(group) == 1 else MUTED
        target = bottom - min(max(place, centre - reach), centre + reach)
        sheet.stroke([start + 0.05, edge - 0.05], [bottom - place, target], color=colour, alpha=0.7)
        if reach:
            sheet.stroke([edge - 0.05] * 2, [bottom - centre - reach, bottom - centre + reach], color=MUTED)
        first = bottom - centre - height / 2 + _LABEL_SLACK / 2
        for i, stroke in zip(group, strokes, strict=True):
            sheet.lines(edge, first, panels.labels[i], size=LABEL, colour=stroke.text)
            first += _label_height(panels.labels[i])


def _at_one_place(ends: Sequence[Point], heights: Sequence[float]) -> list[list[int]]:
    """Indices of lines by where they end, from the top down: those at one x and (nearly) one height together."""
    groups: list[list[int]] = []
    for i in sorted(range(len(ends)), key=lambda i: (ends[i].x, -heights[i])):
        last = groups[-1][-1] if groups else None
        if last is not None and ends[last].x == ends[i].x and heights[last] - heights[i] < _ONE_PLACE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _label_baseline(baseline: Line, panels: Panels, sheet: Sheet, top: float) -> None:
    """The left panel's label, in the clear spot nearest to the end of the baseline."""
    label = wrap(baseline.arm.label, HEADING, panels.plot_width - 0.2, "bold")
    size = np.array([max(text_width(text, HEADING, "bold") for text in label), len(label) * line_height(HEADING)])
    area = np.array([panels.plot_width, panels.plot_height])
    middle = _clear_spot(_outline(baseline, panels) * area, size, area)
    first = top + panels.plot_height - middle[1] - size[1] / 2
    sheet.lines(
        panels.left + middle[0],
        first,
        label,
        size=HEADING,
        weight="bold",
        colour=panels.strokes[baseline.arm.slug].text,
        align="center",
        opaque=True,
    )


def _outline(line: Line, panels: Panels) -> np.ndarray:
    """Points along the baseline and its interval's edges, as shares of the left axes: [points, 2], its end last."""
    points = drawable(line)
    xs = [panels.xs[0].fraction(point.x) for point in points]
    fine = np.linspace(xs[0], xs[-1], 200)
    curves = [
        np.interp(fine, xs, [panels.y.fraction(value) for value in column])
        for column in zip(*((p.y.low, p.y.high, p.y.value) for p in points), strict=True)
    ]
    return np.concatenate([np.stack([fine, curve], axis=1) for curve in curves])


def _clear_spot(curve: np.ndarray, size: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The centre of a box of `size` inside `area` that keeps clear of `curve` and of the lower and left edge, near the
    curve and near its last point."""
    ends = ((s / 2 + _CLEAR, a - s / 2) for s, a in zip(size, area, strict=True))
    grid = np.stack(np.meshgrid(*(np.linspace(low, high, 60) for low, high in ends)), -1)
    centres = grid.reshape(-1, 2)
    outside = np.maximum(np.abs(centres[:, None] - curve[None]) - size / 2, 0)
    gaps = np.linalg.norm(outside, axis=-1).min(axis=1)
    to_end = np.linalg.norm(centres - curve[-1], axis=-1)
    cost = np.where(gaps >= _CLEAR, gaps + 0.3 * to_end, 1e3 - gaps)
    spot: np.ndarray = centres[cost.argmin()]
    return spot


def _label_height(label: Sequence[str]) -> float:
    return len(label) * line_height(LABEL) + _LABEL_SLACK
