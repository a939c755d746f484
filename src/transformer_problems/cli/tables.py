"""What the commands print: the catalogue, one problem, and what was measured."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from transformer_problems.catalogue import Catalogue, Problem, Treatment
from transformer_problems.core.records import Interval
from transformer_problems.core.summaries import ProblemSummary
from transformer_problems.report.formatting import format_interval

_STYLES = {
    "helps": ("green", "+"),
    "no effect": ("yellow", "="),
    "hurts": ("red", "-"),
    "inconclusive": ("yellow", "?"),
    "not runnable here": ("dim", "x"),
    "planned": ("dim", ""),
}


def problems_as_json(catalogue: Catalogue) -> list[dict[str, object]]:
    """The list that `list --json` prints."""
    return [
        {
            "number": problem.number,
            "slug": problem.slug,
            "title": problem.title,
            "category": problem.category,
            "solutions": [
                {"slug": pair.solution.slug, "name": pair.name, "status": pair.status, "verdict": pair.verdict}
                for pair in catalogue.pairs(problem)
            ],
        }
        for problem in catalogue.problems
    ]


def catalogue_table(catalogue: Catalogue) -> None:
    """Print all problems with their solutions and verdicts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("problem", no_wrap=True)
    table.add_column("category", no_wrap=True)
    table.add_column("solutions", ratio=1)
    for problem in catalogue.problems:
        names = Text(", ").join(_marked(pair) for pair in catalogue.pairs(problem))
        table.add_row(f"{problem.number:02d}", problem.title, problem.category, names)
    console = Console()
    console.print(table)
    measured = sum(pair.status == "measured" for pair in catalogue.treatments)
    planned = len(catalogue.treatments) - measured
    words = (("planned", "(none) "), *((word, f"{mark} ") for word, (_, mark) in _STYLES.items() if mark))
    console.print(
        f"\n{len(catalogue.treatments)} pairs of problem and solution: {measured} measured, {planned} planned"
    )
    console.print(Text("   ").join(Text(mark + word, style=_STYLES[word][0]) for word, mark in words))
    console.print("Read one: transformer-problems show 01      Measure: transformer-problems measure 01", style="dim")


def show_problem(catalogue: Catalogue, problem: Problem) -> None:
    """Print one problem's page."""
    console = Console()
    console.print(f"{problem.number:02d}  {problem.title}", style="bold", end="")
    console.print(f"   ({problem.category})", style="dim")
    console.print(f"{problem.statement}\n")
    for heading, text in {
        "Why": problem.cause,
        "Measured": problem.meter,
        "Compared with": problem.baseline,
        "What decides": problem.criterion.text,
    }.items():
        console.print(heading, style="bold")
        console.print(Padding(text, (0, 0, 1, 2)))
    for pair in catalogue.pairs(problem):
        console.print(_named_verdict(pair), style="bold")
        console.print(Padding(pair.solution.how, (0, 0, 0, 2)))
        for label, text in {"gives:": pair.claim, "costs:": pair.cost, "choose it": pair.choose}.items():
            console.print(Padding(f"{label} {text}", (0, 0, 0, 2)))
        if pair.outcome is not None:
            console.print(Padding(f"measured: {pair.outcome.gain}; {pair.outcome.cost}", (0, 0, 0, 2)))
        sources = "; ".join(f"{r.authors} {r.year}, {r.id}" for r in pair.solution.references)
        console.print(Padding(f"source: {sources}", (0, 0, 1, 2)), style="dim")


def measured_table(problem: Problem, summary: ProblemSummary) -> None:
    """Print what was measured of one problem: a row an arm, verdicts last."""
    console = Console()
    console.print(f"\n{problem.number:02d}  {problem.title}", style="bold")
    console.print(f"{summary.finding}\n")
    with_bounds = _measured_table(summary, with_bounds=True)
    fits = console.measure(with_bounds).maximum <= console.width
    console.print(with_bounds if fits else _measured_table(summary, with_bounds=False))
    for note in summary.notes:
        console.print(note, style="dim")


def _measured_table(summary: ProblemSummary, *, with_bounds: bool) -> Table:
    """The table with its 95% intervals, or for narrow terminals with the estimates alone."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("arm", no_wrap=True)
    for column in summary.columns:
        table.add_column(column.label, min_width=6 if not with_bounds else None)
    table.add_column("verdict", no_wrap=True)
    for row in summary.rows:
        estimates = row.cells if with_bounds else [c and Interval(c.value, c.value, c.value) for c in row.cells]
        cells = [format_interval(*entry) for entry in zip(estimates, summary.columns, strict=True)]
        word = row.verdict.word if row.verdict else "-"
        table.add_row(row.arm.label, *cells, Text(word, style=_STYLES[word][0] if word in _STYLES else ""))
    return table


def _named_verdict(pair: Treatment) -> Text:
    word = pair.verdict or pair.status
    return Text.assemble(pair.name, " (", (word, _STYLES[word][0]), ")")


def _marked(pair: Treatment) -> Text:
    """A solution's name behind the mark of its verdict."""
    style, mark = _STYLES[pair.verdict or pair.status]
    return Text(f"{mark} {pair.name}" if mark else pair.name, style=style)
