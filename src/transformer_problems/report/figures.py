"""A problem's picture: what goes wrong on the left, what each solution does to it on the right, verdicts below."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from transformer_problems.catalogue import Catalogue, Problem
from transformer_problems.core.records import Environment
from transformer_problems.core.summaries import Arm, ProblemSummary
from transformer_problems.report import panels, strip
from transformer_problems.report.colours import INK, MUTED, RULE, catalogue_colours, strokes
from transformer_problems.report.formatting import format_count
from transformer_problems.report.sheet import FONT, Sheet, balance, line_height, text_width, wrap

WIDTH, DPI = 8.0, 200  # 1,600 pixels wide: text of 8 points stays 11 pixels tall at 800
_LEFT, _TOP = 0.36, 0.3
_TITLE, _FINDING, _FOOTER = 15.0, 10.0, 7.6
_AFTER_TITLE, _AFTER_FINDING, _AFTER_PANELS, _AFTER_STRIP, _BOTTOM = 0.06, 0.24, 0.24, 0.16, 0.24
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "svg.hashsalt": "transformer-problems",
    "svg.fonttype": "path",
    "path.simplify": False,
    "text.parse_math": False,
}


def draw_problem(
    summary: ProblemSummary,
    problem: Problem,
    catalogue: Catalogue,
    path_png: Path,
    path_svg: Path | None = None,
) -> None:
    """Draws one problem's picture; the same summary always gives the same bytes.

    Args:
        summary: What was measured.
        problem: Its catalogue entry.
        catalogue: Gives every solution its colour.
        path_png: Where the bitmap goes, 1,600 pixels wide.
        path_svg: Where the vector picture goes, if anywhere.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = compose(summary, problem, catalogue_colours(catalogue))
        figure.savefig(path_png, metadata={"Software": None})
        if path_svg is not None:
            figure.savefig(path_svg, metadata={"Date": None, "Creator": None})


def compose(summary: ProblemSummary, problem: Problem, colours: Mapping[str, str]) -> Figure:
    """The picture as a figure, as tall as its texts need."""
    width = WIDTH - 2 * _LEFT
    styles = strokes(contestants(summary), colours)
    finding = balance(summary.finding, _FINDING, width)
    footer = wrap(f"{provenance(summary)} · bands are 95% intervals", _FOOTER, width)
    charts = panels.plan(summary, styles, _LEFT, width)
    verdicts = strip.plan(tuple(row for row in summary.rows if row.arm.lead), styles, _LEFT, width)

    finding_top = _TOP + line_height(_TITLE) + _AFTER_TITLE
    panels_top = finding_top + len(finding) * line_height(_FINDING) + _AFTER_FINDING
    strip_top = panels_top + charts.height + _AFTER_PANELS
    footer_top = strip_top + verdicts.height + _AFTER_STRIP
    sheet = Sheet(WIDTH, footer_top + len(footer) * line_height(_FOOTER) + _BOTTOM, DPI)

    number = f"{problem.number:02d}"
    sheet.text(_LEFT, _TOP, number, size=_TITLE, weight="bold", colour=MUTED)
    sheet.text(_LEFT + text_width(number, _TITLE, "bold") + 0.14, _TOP, problem.title, size=_TITLE, weight="bold")
    sheet.lines(_LEFT, finding_top, finding, size=_FINDING, colour=INK)
    panels.draw(charts, sheet, panels_top, _LEFT)
    strip.draw(verdicts, sheet, strip_top)
    sheet.stroke([_LEFT, WIDTH - _LEFT], [footer_top - _AFTER_STRIP / 2] * 2, color=RULE)
    sheet.lines(_LEFT, footer_top, footer, size=_FOOTER, colour=MUTED)
    return sheet.figure


def contestants(summary: ProblemSummary) -> list[Arm]:
    """Every arm of a summary once, the baseline first."""
    return list(dict.fromkeys([*(row.arm for row in summary.rows), *(line.arm for line in summary.lines)]))


def provenance(summary: ProblemSummary) -> str:
    """Where, when and with what a summary was measured, in one line."""
    where = summary.environment
    return " · ".join(
        (
            machine(where),
            format_count(where.threads, "thread"),
            where.dtype,
            f"{summary.scale} scale",
            _seeds(summary),
            where.date,
            f"transformer-problems {where.version} (code {where.revision[:7]})",
            f"torch {where.torch}",
        )
    )


def _seeds(summary: ProblemSummary) -> str:
    """How many seeds, and what was measured with fewer of them."""
    fewer = ", ".join(f"{metric}: {num}" for metric, num in summary.fewer_seeds)
    return format_count(summary.num_seeds, "seed") + (f" ({fewer})" if fewer else "")


def machine(where: Environment) -> str:
    """The machine in words: processor and device, said once where they are the same."""
    return where.processor if where.device in ("cpu", where.processor) else f"{where.processor}, {where.device}"
