"""A problem's page in Markdown, for the repository's docs."""

from pathlib import Path

from transformer_problems.catalogue import Catalogue, Problem
from transformer_problems.core.summaries import ProblemSummary
from transformer_problems.report.scales import has_chart
from transformer_problems.report.story import leading_rows, render, status_of, variants_of, write_text


def write_problem_page(summary: ProblemSummary | None, problem: Problem, catalogue: Catalogue, folder: Path) -> Path:
    """Writes `README.md` into `folder`; its picture is expected beside it as `problem.png`.

    Args:
        summary: What was measured; None writes the page of a problem that is planned.
        problem: Its catalogue entry.
        catalogue: Holds the problem's solutions and its neighbours.
        folder: Made where it does not exist.
    """
    path = folder / "README.md"
    write_text(path, problem_page(summary, problem, catalogue))
    return path


def problem_page(summary: ProblemSummary | None, problem: Problem, catalogue: Catalogue) -> str:
    """The text of the page."""
    rows = leading_rows(summary)
    problems = list(catalogue.problems)
    place = problems.index(problem)
    return render(
        "problem.md.j2",
        problem=problem,
        summary=summary,
        pictured=summary is not None and has_chart(summary),
        pairs=[
            (pair, status_of(pair, rows), rows.get(pair.solution.slug), variants_of(pair, summary))
            for pair in catalogue.pairs(problem)
        ],
        previous=problems[place - 1] if place else None,
        following=problems[place + 1] if place + 1 < len(problems) else None,
    )
