"""Reads problems.toml, solutions.toml and verdicts.json into typed records; needs no torch.

Plugins: an installed package adds to the catalogue by an entry point that names a function without arguments, which
returns the text of a TOML file in the form of ours. Its `code` paths are whole ("my_package.attention:MyAttention").

    [project.entry-points."transformer_problems.solutions"]      # or "transformer_problems.problems"
    my-attention = "my_package.catalogue:solutions_toml"
"""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any, get_args

from transformer_problems.catalogue.entries import (
    Catalogue,
    Criterion,
    Outcome,
    Problem,
    Reference,
    Role,
    Solution,
    Treatment,
)
from transformer_problems.catalogue.table import Table
from transformer_problems.core.errors import CatalogueError
from transformer_problems.core.records import Scale, VerdictWord

Source = tuple[str, str]
"""Where a text comes from, said in errors, and the text."""

_MEASURED = ("metric", "at", "better", "compare", "margin")
_METRIC = (r"[a-z][a-z0-9_]*", "the name of a metric, such as latency_s")
_REFERENCE_ID = r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d{4,9}/\S+|https://\S+|(?![Aa]r[Xx]iv)[A-Z][\w&' -]* \d{4}"


@cache
def load_catalogue() -> Catalogue:
    """The catalogue of this package and of all installed packages that add to it.

    Raises:
        CatalogueError: If a file or an installed package breaks the form; the message says which and where.
    """
    home = files("transformer_problems.catalogue")

    def own(name: str) -> Source:
        return name, home.joinpath(name).read_text(encoding="utf-8")

    problems = [own("problems.toml"), *_installed("transformer_problems.problems")]
    solutions = [own("solutions.toml"), *_installed("transformer_problems.solutions")]
    return build_catalogue(problems, solutions, own("verdicts.json"))


def build_catalogue(problems: Sequence[Source], solutions: Sequence[Source], verdicts: Source) -> Catalogue:
    """The catalogue of some TOML texts and a JSON text of verdicts, all checked."""
    found = tuple(sorted((_problem(t) for t in _tables(problems, "problem")), key=lambda problem: problem.number))
    _require_unique("problem number", (str(problem.number) for problem in found))
    _require_unique("problem slug", (problem.slug for problem in found))
    numbered = {problem.number: problem for problem in found}
    entries = [_solution(table, numbered) for table in _tables(solutions, "solution")]
    _require_unique("solution slug", (solution.slug for solution, _ in entries))
    placed = [pair for _, pairs in entries for pair in pairs]
    treatments = tuple(t for problem in found for t in _in_order([p for p in placed if p[0].problem == problem]))
    _require_unique("pair", (treatment.key for treatment in treatments))
    catalogue = Catalogue(found, tuple(solution for solution, _ in entries), treatments)
    return _with_verdicts(catalogue, verdicts)


def _installed(group: str) -> Iterator[Source]:
    """What installed packages add; whatever one of them does wrong is told with its name."""
    for entry in entry_points(group=group):
        package = f"package {entry.dist.name if entry.dist else entry.module} (entry point {group}: {entry.value})"
        try:
            text = entry.load()()
        except Exception as error:
            raise CatalogueError(
                f"{package} fails with {type(error).__name__}: {error}. Update or uninstall the package."
            ) from error
        if not isinstance(text, str):
            raise CatalogueError(f"{package} must return the text of a TOML file; got {type(text).__name__}.")
        yield package, text


def _tables(sources: Iterable[Source], kind: str) -> Iterator[Table]:
    """Every [[kind]] of the texts."""
    for where, text in sources:
        try:
            whole = Table(tomllib.loads(text), where)
        except tomllib.TOMLDecodeError as error:
            raise CatalogueError(f"{where} is not valid TOML: {error}.") from error
        yield from whole.tables(kind)
        whole.done()


def _problem(table: Table) -> Problem:
    problem = Problem(
        number=table.integer("number", 1, 99),
        slug=table.text("slug", r"[a-z0-9]+(_[a-z0-9]+)*", "lower-case words joined by underscores"),
        title=table.text("title"),
        category=table.text("category"),
        statement=table.text("statement"),
        cause=table.text("cause"),
        meter=table.text("meter"),
        baseline=table.text("baseline"),
        criterion=_criterion(table.table("criterion"), None),
        references=_references(table),
    )
    table.done()
    return problem


def _solution(table: Table, problems: Mapping[int, Problem]) -> tuple[Solution, list[tuple[Treatment, int | None]]]:
    """A solution and its pairs, each with the place it asks for."""
    solution = Solution(
        slug=table.text("slug", r"[a-z0-9]+(-[a-z0-9]+)*", "lower-case words joined by hyphens"),
        name=table.text("name"),
        role=table.choice("role", get_args(Role)),
        how=table.text("how"),
        code=_code(table) if "code" in table else (),
        example=_example(table) if "example" in table else "",
        references=_references(table),
    )
    if solution.example and not solution.code:
        raise CatalogueError(f"{table.where} has an example but no code: an example must run. Remove it or add code.")
    pairs = [_treatment(treats, solution, problems) for treats in table.tables("treats")]
    table.done()
    return solution, pairs


def _treatment(table: Table, solution: Solution, problems: Mapping[int, Problem]) -> tuple[Treatment, int | None]:
    number = table.integer("problem", 1, 99)
    if number not in problems:
        raise table.error("problem", f"the number of a problem ({', '.join(map(str, problems))})", number)
    problem = problems[number]
    inherited = problem.criterion
    treatment = Treatment(
        solution=solution,
        problem=problem,
        name=table.text("name") if "name" in table else solution.name,
        claim=table.text("claim"),
        cost=table.text("cost"),
        choose=table.text("choose", r"when .+", 'a text that starts with "when"'),
        criterion=_criterion(table.table("criterion"), inherited) if "criterion" in table else inherited,
        code=_code(table) if "code" in table else solution.code,
        example=_example(table) if "example" in table else solution.example,
    )
    place = table.integer("place", 1, 99) if "place" in table else None
    table.done()
    return treatment, place


def _criterion(table: Table, inherited: Criterion | None) -> Criterion:
    """A criterion, or what a pair changes of its problem's."""
    given: dict[str, Any] = {}
    if "text" in table or inherited is None:
        given["text"] = table.text("text")
    measured = [key for key in table.remaining() if key in _MEASURED]
    if "metric" in table:
        given["metric"] = table.text("metric", *_METRIC)
        given["at"] = None  # another metric is varied in another way, or in none
    if "at" in table:
        given["at"] = _at(table)
    if "better" in table:
        given["better"] = table.choice("better", ("lower", "higher"))
    if "compare" in table:
        given["compare"] = table.choice("compare", ("ratio", "difference"))
    if "margin" in table:
        given["margin"] = float(table.take("margin", (int, float), "a number, 0 or more"))
        if not 0 <= given["margin"] < float("inf"):
            raise table.error("margin", "a number, 0 or more", given["margin"])
    if "promise" in table:
        given["promise"] = table.text("promise", *_METRIC)
        given["promise_limit"] = float(table.take("promise_limit", (int, float), "a number"))
    if "quality" in table:
        given["quality"] = table.text("quality", *_METRIC)
        given["quality_better"] = table.choice("quality_better", ("lower", "higher"))
        given["quality_loss"] = float(table.take("quality_loss", (int, float), "a number"))
    table.done()
    if inherited is not None and inherited.metric:
        return replace(inherited, **given)
    if measured and (missing := [key for key in _MEASURED if key not in (*measured, "at")]):
        raise CatalogueError(
            f"{table.where} has {', '.join(measured)} but lacks {', '.join(missing)}. "
            "Give metric, better, compare and margin together, or none of them."
        )
    return Criterion(**given) if inherited is None else replace(inherited, **given)


def _at(table: Table) -> Any:
    value = table.take("at", (int, float, str), 'a number or "last"')
    if isinstance(value, str) and value != "last":
        raise table.error("at", 'a number or "last"', value)
    return value if isinstance(value, str) else float(value)


def _references(table: Table) -> tuple[Reference, ...]:
    references = []
    for entry in table.tables("references"):
        reference = Reference(
            title=entry.text("title"),
            authors=entry.text("authors"),
            year=entry.integer("year", 1900, 2100),
            id=entry.text(
                "id", _REFERENCE_ID, 'like "arXiv:1706.03762", "doi:10.1145/1498765.1498785" or "EMNLP 2016"'
            ),
        )
        entry.done()
        references.append(reference)
    return tuple(references)


def _code(table: Table) -> tuple[str, ...]:
    """One path, or one for each form of a method; an empty list says that no form is implemented."""
    rule = '"module:attribute", or a list of such paths'
    value = table.take("code", (str, list), rule)
    paths = [value] if isinstance(value, str) else value
    for path in paths:
        if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path):
            raise table.error("code", rule, path)
    return tuple(paths)


def _example(table: Table) -> str:
    example: str = table.take("example", str, "lines of Python")
    return example.strip("\n")


def _in_order(pairs: Sequence[tuple[Treatment, int | None]]) -> list[Treatment]:
    """One problem's pairs in file order, but those that ask for a place put there."""
    ordered = [treatment for treatment, place in pairs if place is None]
    for treatment, place in sorted(((t, p) for t, p in pairs if p is not None), key=lambda pair: pair[1]):
        ordered.insert(place - 1, treatment)
    return ordered


def _with_verdicts(catalogue: Catalogue, source: Source) -> Catalogue:
    """The catalogue with what was measured."""
    where, text = source
    try:
        table = Table(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise CatalogueError(f"{where} is not valid JSON: {error}.") from error
    pairs = table.table("pairs")
    made = bool(pairs.remaining())
    scale = table.choice("scale", get_args(Scale)) if made or "scale" in table else None
    day = r"\d{4}-\d\d-\d\d" if made else r"(\d{4}-\d\d-\d\d)?"
    date = table.text("date", day, 'like "2026-01-31"') if made or "date" in table else ""
    table.done()
    outcomes = {key: _outcome(pairs.table(key)) for key in pairs.remaining()}
    judged = {treatment.key for treatment in catalogue.treatments if treatment.criterion.metric}
    if strange := sorted(set(outcomes) - judged):
        raise CatalogueError(
            f"{where} has verdicts on {', '.join(strange)}: no such pair, or its criterion names no metric. "
            "Correct the key, or complete the criterion in problems.toml."
        )
    treatments = tuple(replace(t, outcome=outcomes.get(t.key)) for t in catalogue.treatments)
    return replace(catalogue, treatments=treatments, scale=scale, date=date)


def _outcome(table: Table) -> Outcome:
    outcome = Outcome(
        verdict=table.choice("verdict", get_args(VerdictWord)),
        gain=table.text("gain", r".*", "a text"),
        cost=table.text("cost", r".*", "a text"),
    )
    table.done()
    return outcome


def _require_unique(kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CatalogueError(f"{kind} {name} occurs twice in the catalogue, or in a package that adds to it.")
        seen.add(name)
