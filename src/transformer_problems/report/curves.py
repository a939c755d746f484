"""The small chart beside a finding: what a check-up saw along lengths, layers or labels."""

import io
import math
import re
from collections.abc import Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from transformer_problems.core.findings import Curve
from transformer_problems.report.colours import BASELINE, INK, MUTED, PALETTE, RULE, readable
from transformer_problems.report.figures import STYLE
from transformer_problems.report.formatting import format_tick
from transformer_problems.report.inline import inline_svg
from transformer_problems.report.sheet import Sheet, line_height, text_width, wrap

_WIDTH, _HEIGHT, _DPI = 5.2, 2.0, 100
_LEFT, _RIGHT, _BELOW = 0.62, 0.12, 0.5
_TITLE, _LABEL = 9.0, 8.0

Points = Sequence[tuple[float, float]]


def draw_curve(curve: Curve, name: str) -> str:
    """An SVG element; `name` is unique on its page, so that the parts of two charts are not mistaken for each other."""
    lines: dict[str, Points] = {"": curve.points, **curve.beside}
    colours = dict(zip(lines, (PALETTE[0], BASELINE, *PALETTE[1:]), strict=False))
    to_label = max((text_width(label, _LABEL) + 0.1 for label in curve.beside), default=0.0)
    title = wrap(curve.title, _TITLE, _WIDTH - 0.2, "bold")
    top = 0.1 + len(title) * line_height(_TITLE) + line_height(_LABEL) + 0.12
    with matplotlib.style.context(["default", STYLE]):
        sheet = Sheet(_WIDTH, top + _HEIGHT + _BELOW, _DPI)
        below = sheet.lines(0.1, 0.1, title, size=_TITLE, weight="bold", colour=INK)
        sheet.text(0.1, below, curve.y_label, size=_LABEL, colour=MUTED)
        width = _WIDTH - _LEFT - _RIGHT - to_label
        axes = sheet.axes(_LEFT, top, width, _HEIGHT)
        _set_scales(axes, curve, lines)
        for label, points in lines.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=colours[label], linewidth=1.6 if not label else 1.2, marker="o", markersize=2.5)
        _label_ends(axes, sheet, curve, colours, (_LEFT + width + 0.06, top))
        sheet.text(_LEFT + width / 2, top + _HEIGHT + 0.26, curve.x_label, size=_LABEL, colour=MUTED, align="center")
        drawn = io.StringIO()
        sheet.figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return _with_own_ids(inline_svg(drawn.getvalue(), curve.title), name)


def _set_scales(axes: Axes, curve: Curve, lines: dict[str, Points]) -> None:
    every = [point for points in lines.values() for point in points]
    for axis, is_log, values in (
        (axes.xaxis, curve.x_log, [x for x, _ in every]),
        (axes.yaxis, curve.y_log and min(y for _, y in every) > 0, [y for _, y in every]),
    ):
        which = "x" if axis is axes.xaxis else "y"
        whole = which == "x" and all(float(value).is_integer() for value in values)
        if is_log and min(values) > 0:
            getattr(axes, f"set_{which}scale")("log")
            few = max(values) / min(values) < 30
            axis.set_major_locator(LogLocator(base=2 if few else 10))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(MaxNLocator(5, integer=whole))
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(float(f"{value:.6g}"))))
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.tick_params(axis="y", length=0, labelsize=_LABEL, labelcolor=MUTED)
    axes.tick_params(axis="x", length=3, width=0.6, color=MUTED, labelsize=_LABEL, labelcolor=MUTED)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set(color=MUTED, linewidth=0.6)


def _label_ends(axes: Axes, sheet: Sheet, curve: Curve, colours: dict[str, str], corner: tuple[float, float]) -> None:
    """Each line beside the reading's is named where it ends, and no two names overlap."""
    axes.autoscale_view()  # else done when drawn, after the places are asked for
    frame, ends = axes.get_window_extent(), []
    for label, points in curve.beside.items():
        _, pixel = axes.transData.transform(points[-1])
        ends.append((_HEIGHT * (1 - (pixel - frame.y0) / frame.height), label))
    taken = -math.inf
    for place, label in sorted(ends):
        taken = max(place, taken + line_height(_LABEL))
        x, top = corner
        sheet.text(x, top + taken, label, size=_LABEL, colour=readable(colours[label]), anchor="center")


def _with_own_ids(svg: str, name: str) -> str:
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
