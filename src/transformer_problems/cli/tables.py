"""What the commands print: the catalogue, one problem, and what was measured."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from transformer_problems.catalogue import Catalogue, Problem, Solution, Treatment
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.records import Interval
from transformer_problems.core.summaries import Column, ProblemSummary
from transformer_problems.report.formatting import format_interval, format_verdict

_GAP = 2  # spaces between two columns
_STYLES = {
    "helps": ("green", "+"),
    "no effect": ("yellow", "="),
    "hurts": ("red", "-"),
    "inconclusive": ("yellow", "?"),
    "diverged": ("red", "∞"),
    "not runnable here": ("dim", "x"),
    "planned": ("dim", ""),
}


def named_problem(catalogue: Catalogue, name: str) -> Problem:
    """The problem that a user means by a number or slug."""
    if name.strip().isdigit() and int(name) not in (problem.number for problem in catalogue.problems):
        first, last = catalogue.problems[0].number, catalogue.problems[-1].number
        raise ArgumentError(f"unknown problem {name!r}. Numbers go from {first:02d} to {last:02d}.")
    return catalogue.problem(name)


def named_entry(catalogue: Catalogue, name: str) -> Problem | Solution:
    """The problem that a user means by a number or slug, or the solution by a slug or name.

    Raises:
        ArgumentError: If there is neither; the message lists the nearest of both.
    """
    if name.strip().isdigit():
        return named_problem(catalogue, name)
    finders: tuple[Callable[[str], Problem | Solution], ...] = (catalogue.problem, catalogue.solution)
    for find in finders:
        try:
            return find(name)
        except UnknownNameError:
            continue
    known = [*(problem.slug for problem in catalogue.problems), *(solution.slug for solution in catalogue.solutions)]
    raise UnknownNameError("problem or solution", name, known)


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
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
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
    console.print(
        "Read one: transformer-problems show 01, or show swin      Measure: transformer-problems measure 01",
        style="dim",
    )


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
        console.print(_named_verdict(pair, pair.name), style="bold")
        console.print(Padding(pair.solution.how, (0, 0, 0, 2)))
        _print_claims(console, pair)
        sources = "; ".join(f"{r.authors} {r.year}, {r.id}" for r in pair.solution.references)
        console.print(Padding(f"source: {sources}", (0, 0, 1, 2)), style="dim")


def show_solution(catalogue: Catalogue, solution: Solution) -> None:
    """Print one solution's page: what it is, what it does for each problem, and how it is used."""
    console = Console()
    console.print(solution.name, style="bold", end="")
    console.print(f"   ({solution.role})", style="dim")
    console.print(f"{solution.how}\n")
    pairs = catalogue.pairs_of(solution)
    for pair in pairs:
        console.print(_named_verdict(pair, f"{pair.problem.number:02d}  {pair.problem.title}"), style="bold")
        _print_claims(console, pair)
        console.print()
    _print_code(console, "Code", "\n".join(dict.fromkeys(path for pair in pairs for path in pair.code)))
    for example in dict.fromkeys(pair.example for pair in pairs):
        _print_code(console, "Example", example)
    console.print("References", style="bold")
    for source in solution.references:
        console.print(Padding(f"{source.authors} {source.year}, {source.title}, {source.id}", (0, 0, 0, 2)))


def _print_claims(console: Console, pair: Treatment) -> None:
    """What a solution promises, costs and was measured to do for a problem."""
    for label, text in {"gives:": pair.claim, "costs:": pair.cost, "choose it": pair.choose}.items():
        console.print(Padding(f"{label} {text}", (0, 0, 0, 2)))
    if pair.criterion.text != pair.problem.criterion.text:
        console.print(Padding(f"what decides here: {pair.criterion.text}", (0, 0, 0, 2)))
    if pair.outcome is not None:
        console.print(Padding(f"measured: {pair.outcome.gain}; {pair.outcome.cost}", (0, 0, 0, 2)))


def _print_code(console: Console, heading: str, code: str) -> None:
    """Lines of code as they stand, to be copied, under their heading; nothing where there are none."""
    if code:
        console.print(heading, style="bold")
        for line in code.splitlines():
            console.print(Text(f"  {line}" if line else ""), soft_wrap=True)
        console.print()


def measured_table(problem: Problem, summary: ProblemSummary) -> None:
    """Print what was measured of one problem: a row an arm, verdicts last."""
    console = Console()
    console.print(f"\n{problem.number:02d}  {problem.title}", style="bold")
    console.print(f"{summary.finding}\n")
    choices = ((summary.columns, True), (summary.columns, False), (_decisive(problem, summary.columns), False))
    tables = (_measured_table(summary, columns, with_bounds, console.width) for columns, with_bounds in choices)
    console.print(next(table for table in tables if table is not None))
    for note in summary.notes:
        console.print(note, style="dim")


def _decisive(problem: Problem, columns: Sequence[Column]) -> Sequence[Column]:
    """The one column that shows what the problem's criterion reads."""
    read = [column for column in columns if (column.metric, column.statistic) == (problem.criterion.metric, "mean")]
    exact = [column for column in read if column.at == problem.criterion.at]
    return (exact or read or columns)[-1:]


def _measured_table(summary: ProblemSummary, columns: Sequence[Column], with_bounds: bool, room: int) -> Table | None:
    """The table of some columns, with their 95% intervals or the estimates alone; None where it has no room, unless it
    has a single column. Headings and labels may take more lines; no other word and no number is ever cut."""
    entries = [["arm", *(column.label for column in columns), "verdict"]]
    for row in summary.rows:
        shown = [(cell, column) for cell, column in zip(row.cells, summary.columns, strict=True) if column in columns]
        estimates = [cell if with_bounds or cell is None else Interval(*[cell.value] * 3) for cell, _ in shown]
        cells = [format_interval(cell, column) for cell, (_, column) in zip(estimates, shown, strict=True)]
        entries.append([row.arm.label, *cells, format_verdict(row)])
    (_, *labels), *figures = zip(*entries, strict=True)
    widths = [max(map(len, [*heading.split(), *cells])) for heading, *cells in figures]
    for_labels = room - sum(widths) - _GAP * len(widths)
    if for_labels < max(len(word) for label in labels for word in label.split()) and len(columns) > 1:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for heading, width in zip(entries[0], [min(for_labels, max(map(len, labels))), *widths], strict=True):
        table.add_column(heading, width=width, overflow="fold")
    for *cells, word in entries[1:]:
        table.add_row(*cells, Text(word, style=_STYLES[word][0] if word in _STYLES else ""))
    return table


def _named_verdict(pair: Treatment, name: str) -> Text:
    word = pair.verdict or pair.status
    return Text.assemble(name, " (", (word, _STYLES[word][0]), ")")


def _marked(pair: Treatment) -> Text:
    """A solution's name behind the mark of its verdict."""
    style, mark = _STYLES[pair.verdict or pair.status]
    return Text(f"{mark} {pair.name}" if mark else pair.name, style=style)
