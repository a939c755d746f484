"""What every page tells of a problem, whatever its markup: verdicts by solution, status words, reference links."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from transformer_problems.catalogue import Catalogue, Problem, Reference, Treatment
from transformer_problems.checkpoints.sizes import told_bytes
from transformer_problems.core.summaries import ProblemSummary, Row
from transformer_problems.report.colours import VERDICT_MARKS, dark_theme
from transformer_problems.report.figures import provenance
from transformer_problems.report.formatting import (
    ABSENT,
    NOT_YET,
    format_amount,
    format_bytes,
    format_count,
    format_interval,
    format_limit,
    format_number,
    format_reading,
    format_verdict,
)
from transformer_problems.report.strip import gain_text

_ON_A_CARD, _FEW_SEEDS = 3, 3
_VERDICT_ORDER = ("helps", "no effect", "inconclusive", "hurts", "diverged", "not runnable here", NOT_YET, "planned")


def leading_rows(summary: ProblemSummary | None) -> dict[str, Row]:
    """The row that speaks for each solution, by slug."""
    return {row.arm.solution: row for row in summary.rows if row.arm.lead and row.arm.solution} if summary else {}


def variants_of(pair: Treatment, summary: ProblemSummary | None) -> list[Row]:
    """The rows of a solution's other arms."""
    rows = summary.rows if summary else ()
    return [row for row in rows if row.arm.solution == pair.solution.slug and not row.arm.lead]


def status_of(pair: Treatment, rows: Mapping[str, Row]) -> str:
    """A pair's verdict where these results hold one; else why there is none: planned, not asked for, not yet."""
    row = rows.get(pair.solution.slug)
    if row is not None and (row.verdict is not None or row.not_asked):
        return format_verdict(row)
    return "planned" if pair.status == "planned" else NOT_YET


def pairs_best_first(
    catalogue: Catalogue, problem: Problem, rows: Mapping[str, Row]
) -> list[tuple[Treatment, str, Row | None]]:
    """Each pair with its status and row: those that help first, else in the catalogue's order."""
    told = [(pair, status_of(pair, rows), rows.get(pair.solution.slug)) for pair in catalogue.pairs(problem)]
    return sorted(told, key=lambda entry: _VERDICT_ORDER.index(entry[1] if entry[1] in _VERDICT_ORDER else NOT_YET))


def headline(told: Sequence[tuple[Treatment, str, Row | None]]) -> list[tuple[Treatment, str, Row | None]]:
    """Of a problem's measured pairs, best first, the three that a card has room for and every one that does harm."""
    measured = [entry for entry in told if entry[2] is not None]
    return [entry for place, entry in enumerate(measured) if place < _ON_A_CARD or entry[1] in ("hurts", "diverged")]


def interval_note(summary: ProblemSummary) -> str:
    """A sentence, with a space behind it, on what intervals of few seeds leave out; see `lab.statistics`."""
    if summary.num_seeds > _FEW_SEEDS:
        return ""
    if summary.num_seeds == 1:
        return "One seed was measured, so the intervals leave out how much seeds differ. "
    return "With so few seeds they cover the truth less often than that, about 89% of the time at three. "


def import_line(code: Sequence[str]) -> str:
    """The import that brings the names of some "module:attribute" paths, all of them public."""
    return f"from transformer_problems import {', '.join(path.rpartition(':')[2] for path in code)}"


def reference_url(reference: Reference) -> str:
    """Where a reference can be read; empty where its identifier has no address."""
    kind, _, rest = reference.id.partition(":")
    homes = {"arxiv": "https://arxiv.org/abs/", "doi": "https://doi.org/", "https": "https:", "http": "http:"}
    return homes[kind.lower()] + rest if kind.lower() in homes else ""


def themed(colour: str) -> str:
    """A colour as CSS that the dark theme may replace."""
    return f"var(--c-{colour[1:].lower()}, {colour})"


def render(template: str, **context: Any) -> str:
    """A template of this package filled in; HTML is escaped, undefined names are errors."""
    environment = Environment(
        loader=PackageLoader("transformer_problems.report"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "amount": format_amount,
        "told_bytes": told_bytes,
        "bytes": format_bytes,
        "interval": format_interval,
        "limit": format_limit,
        "number": format_number,
        "reading": format_reading,
        "count": format_count,
        "gain": gain_text,
        "headline": headline,
        "interval_note": interval_note,
        "verdict": format_verdict,
        "import_line": import_line,
        "reference_url": reference_url,
        "provenance": provenance,
        "table_cell": table_cell,
        "one_line": one_line,
        "themed": themed,
    }
    environment.globals |= {"ABSENT": ABSENT, "MARKS": VERDICT_MARKS, "DARK": dark_theme()}
    return environment.get_template(template).render(context)


def one_line(text: str) -> str:
    """Text without its line breaks, which would end a list item or a table row."""
    return " ".join(text.split())


def table_cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with line feeds on every platform, so that the same results give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
