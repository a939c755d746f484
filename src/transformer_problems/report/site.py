"""The static site: an index of all problems, a page for each, and the records behind every number."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformer_problems.catalogue import Catalogue
from transformer_problems.core.summaries import ProblemSummary
from transformer_problems.report.colours import catalogue_colours
from transformer_problems.report.figures import draw_problem, machine
from transformer_problems.report.inline import inline_svg
from transformer_problems.report.ledger import Record, ledger, records_csv
from transformer_problems.report.scales import has_chart
from transformer_problems.report.story import (
    leading_rows,
    pairs_best_first,
    render,
    status_of,
    variants_of,
    write_text,
)

Records = Mapping[int, Sequence[Record]]


def write_report(folder: Path, catalogue: Catalogue, summaries: Mapping[int, ProblemSummary], records: Records) -> Path:
    """Writes pictures and site into `folder`; returns the path of its `index.html`.

    Args:
        folder: Made where it does not exist; a problem's files go to `folder / problem.folder`.
        catalogue: The problems and solutions, all of which get a page.
        summaries: What was measured, by problem number.
        records: What every summary was made from, by problem number.
    """
    for problem in catalogue.problems:
        summary = summaries.get(problem.number)
        if summary is not None and has_chart(summary):
            home = folder / problem.folder
            home.mkdir(parents=True, exist_ok=True)
            draw_problem(summary, problem, catalogue, home / "problem.png", home / "problem.svg")
    return write_site(folder, catalogue, summaries, records)


def write_site(folder: Path, catalogue: Catalogue, summaries: Mapping[int, ProblemSummary], records: Records) -> Path:
    """Writes `index.html`, and for each problem its page and records, beside pictures that are there already.

    The pages need no network and no script: styles and pictures are inside them.
    """
    problems = list(catalogue.problems)
    for place, problem in enumerate(problems):
        home, known = folder / problem.folder, records.get(problem.number, ())
        summary = summaries.get(problem.number)
        rows = leading_rows(summary)
        page = render(
            "problem.html.j2",
            problem=problem,
            summary=summary,
            picture=inline_svg(
                (home / "problem.svg").read_text(encoding="utf-8"), f"Measured picture of problem {problem.number:02d}"
            )
            if summary and has_chart(summary)
            else "",
            pairs=[
                (pair, status_of(pair, rows), rows.get(pair.solution.slug), variants_of(pair, summary))
                for pair in catalogue.pairs(problem)
            ],
            colours=catalogue_colours(catalogue),
            recorded={(cell.arm, measurement.metric) for cell, measurement in known},
            previous=problems[place - 1] if place else None,
            following=problems[place + 1] if place + 1 < len(problems) else None,
        )
        write_text(home / "index.html", page)
        if known:
            write_text(home / "records.csv", records_csv(known))
            write_text(home / "records.html", render("records.html.j2", problem=problem, ledger=ledger(known)))
    path = folder / "index.html"
    write_text(path, render("index.html.j2", **_index(catalogue, summaries)))
    return path


def _index(catalogue: Catalogue, summaries: Mapping[int, ProblemSummary]) -> dict[str, object]:
    """What the index shows: every problem with its pairs, and its place in each order a reader may choose."""
    problems = list(catalogue.problems)
    told = {p.number: pairs_best_first(catalogue, p, leading_rows(summaries.get(p.number))) for p in problems}
    helped = {number: sum(status == "helps" for _, status, _ in pairs) for number, pairs in told.items()}
    orders = {
        "category": sorted(problems, key=lambda p: (p.category, p.number)),
        "verdict": sorted(problems, key=lambda p: (-helped[p.number], p.number not in summaries, p.number)),
    }
    return {
        "problems": problems,
        "told": told,
        "summaries": summaries,
        "places": {order: {p.number: i for i, p in enumerate(ranked)} for order, ranked in orders.items()},
        "num_pairs": sum(map(len, told.values())),
        "num_measured": sum(row is not None for pairs in told.values() for _, _, row in pairs),
        "num_helping": sum(helped.values()),
        "machines": list(dict.fromkeys(machine(summary.environment) for summary in summaries.values())),
    }
