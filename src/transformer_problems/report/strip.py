"""The strip below the panels: each solution's verdict, what it gains, what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformer_problems.core.records import VerdictWord
from transformer_problems.core.summaries import Row
from transformer_problems.report.colours import MUTED, RULE, VERDICT_COLOURS, VERDICT_MARKS, Stroke
from transformer_problems.report.formatting import ABSENT, format_verdict
from transformer_problems.report.sheet import Sheet, line_height, wrap

SIZE, HEAD = 8.4, 8.0
_SWATCH, _MARK, _GUTTER, _PAD = 0.34, 0.17, 0.16, 0.075
_SHARES = (0.225, 0.175, 0.3, 0.3)  # name, verdict, gain, cost
_HEADINGS = ("Solution", "Verdict", "What it gains", "Also measured")


@dataclass(frozen=True, slots=True)
class _Entry:
    stroke: Stroke
    word: VerdictWord | None
    columns: tuple[tuple[str, ...], ...]

    @property
    def height(self) -> float:
        return max(map(len, self.columns)) * line_height(SIZE) + 2 * _PAD


@dataclass(frozen=True, slots=True)
class Strip:
    """The strip's texts, wrapped to its columns; sizes in inches."""

    entries: tuple[_Entry, ...]
    edges: tuple[float, ...]  # left edge of each column
    left: float
    width: float

    @property
    def height(self) -> float:
        return line_height(HEAD) + _PAD + sum(entry.height for entry in self.entries)


def gain_text(row: Row) -> str:
    """What a row gains; where nothing is said, why its verdict is what it is."""
    return row.gain or (row.verdict.reason if row.verdict else "")


def plan(rows: tuple[Row, ...], strokes: Mapping[str, Stroke], left: float, width: float) -> Strip:
    """Wraps one entry for each row."""
    room = width - _SWATCH
    edges = tuple(left + _SWATCH + room * sum(_SHARES[:i]) for i in range(len(_SHARES)))
    entries = []
    for row in rows:
        word = row.verdict.word if row.verdict else None
        widths = [room * share - _GUTTER for share in _SHARES]
        columns = (
            wrap(row.arm.label, SIZE, widths[0]),
            wrap(format_verdict(row), SIZE, widths[1] - _MARK, "bold"),
            wrap(gain_text(row) or ABSENT, SIZE, widths[2]),
            wrap(row.cost or ABSENT, SIZE, widths[3]),
        )
        entries.append(_Entry(strokes[row.arm.slug], word, tuple(map(tuple, columns))))
    return Strip(tuple(entries), edges, left, width)


def draw(strip: Strip, sheet: Sheet, top: float) -> None:
    """Draws the strip with its upper edge at `top`."""
    for x, heading in zip((strip.left, *strip.edges[1:]), _HEADINGS, strict=True):
        sheet.text(x, top, heading, size=HEAD, colour=MUTED)
    y = top + line_height(HEAD) + _PAD
    for entry in strip.entries:
        sheet.stroke([strip.left, strip.left + strip.width], [y, y], color=RULE)
        middle = y + _PAD + line_height(SIZE) / 2
        dashes = (0, entry.stroke.dashes) if entry.stroke.dashes else "-"
        swatch = [strip.left, strip.left + _SWATCH - 0.1]
        sheet.stroke(swatch, [middle] * 2, color=entry.stroke.line, linewidth=2.4, linestyle=dashes)
        name, verdict, gain, cost = entry.columns
        name_x, verdict_x, gain_x, cost_x = strip.edges
        colour = VERDICT_COLOURS[entry.word] if entry.word else MUTED
        for x, lines in ((name_x, name), (gain_x, gain), (cost_x, cost)):
            sheet.lines(x, y + _PAD, lines, size=SIZE)
        sheet.text(verdict_x, y + _PAD, VERDICT_MARKS[entry.word] if entry.word else ABSENT, size=SIZE, colour=colour)
        sheet.lines(verdict_x + _MARK, y + _PAD, verdict, size=SIZE, colour=colour, weight="bold")
        y += entry.height
