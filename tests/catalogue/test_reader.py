"""The reader accepts what is well formed, refuses everything else with a clear error, and finds names."""

import json
import sys
from dataclasses import FrozenInstanceError
from importlib.metadata import EntryPoint

import pytest

from transformer_problems.catalogue import Catalogue, load_catalogue, reader
from transformer_problems.catalogue.reader import build_catalogue
from transformer_problems.core.errors import CatalogueError, UnknownNameError

PROBLEM = """
[[problem]]
number = 7
slug = "slow_tea"
title = "Slow tea"
category = "Kitchen"
statement = '''
Tea takes
long.'''
cause = "Water is cold."
meter = "Seconds."
baseline = "A pan."
[problem.criterion]
text = "Helps when faster."
metric = "latency_s"
at = 16
better = "lower"
compare = "ratio"
margin = 0.1
[[problem.references]]
title = "Tea"
authors = "Brown et al."
year = 2017
id = "arXiv:1706.03762"
"""
SOLUTION = """
[[solution]]
slug = "electric-kettle"
name = "Electric Kettle"
role = "attention"
how = "It heats."
code = "solutions.kettle:Kettle"
[[solution.references]]
title = "Kettles"
authors = "Green"
year = 2009
id = "doi:10.1145/1498765.1498785"
[[solution.treats]]
problem = 7
claim = "Faster."
cost = "Power."
choose = "when thirsty."
"""
NO_VERDICTS = '{"pairs": {}}'


def build(problem: str = PROBLEM, solution: str = SOLUTION, verdicts: str = NO_VERDICTS) -> Catalogue:
    return build_catalogue([("problems.toml", problem)], [("solutions.toml", solution)], ("verdicts.json", verdicts))


def another(slug: str, *, extra: str = "") -> str:
    return SOLUTION.replace("electric-kettle", slug) + extra


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} must occur once"
    return text.replace(old, new)


def test_a_pair_takes_over_what_it_does_not_change() -> None:
    (pair,) = build().pairs(7)
    assert (pair.key, pair.name, pair.code) == ("07/electric-kettle", "Electric Kettle", ("solutions.kettle:Kettle",))
    assert pair.problem.statement == "Tea takes long."
    assert pair.criterion == pair.problem.criterion
    assert pair.criterion.at == 16.0
    assert (pair.status, pair.verdict, pair.outcome) == ("planned", None, None)


@pytest.mark.parametrize(("own", "shown"), [("", "boil()"), ('example = "steep()"', "steep()")])
def test_a_pair_may_show_an_example_of_its_own(own: str, shown: str) -> None:
    code = 'code = "solutions.kettle:Kettle"'
    solution = changed(SOLUTION, code, f'{code}\nexample = "boil()"') + own
    assert build(solution=solution).pairs(7)[0].example == shown


def test_a_pair_changes_name_code_and_part_of_the_criterion() -> None:
    override = (
        'name = "Kettle"\ncode = ["a:B", "a.c:D"]\n[solution.treats.criterion]\nmetric = "energy_j"\nat = "last"\n'
    )
    (pair,) = build(solution=SOLUTION + override).pairs(7)
    assert (pair.name, pair.solution.name) == ("Kettle", "Electric Kettle")
    assert (pair.code, pair.solution.code) == (("a:B", "a.c:D"), ("solutions.kettle:Kettle",))
    assert (pair.criterion.metric, pair.criterion.at) == ("energy_j", "last")
    assert (pair.criterion.text, pair.criterion.margin) == ("Helps when faster.", 0.1)


def test_a_criterion_may_be_in_words_only() -> None:
    words = PROBLEM[: PROBLEM.index("metric")] + PROBLEM[PROBLEM.index("[[problem.references]]") :]
    assert build(words).problem(7).criterion.metric == ""


def test_places_reorder_file_order() -> None:
    solutions = another("one", extra="place = 3\n") + another("two") + another("three") + another("four")
    assert [pair.solution.slug for pair in build(solution=solutions).pairs(7)] == ["two", "three", "one", "four"]


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        build().problem(7).title = "Fast tea"  # type: ignore[misc]


@pytest.mark.parametrize("name", [7, "7", "07", "slow_tea", "Slow-Tea", "07_slow_tea", " 07 "])
def test_problems_are_found_by_any_name(name: int | str) -> None:
    assert build().problem(name).number == 7


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown problem 'slow_te'\. Nearest: slow_tea"):
        build().problem("slow_te")
    with pytest.raises(UnknownNameError, match=r"unknown solution 'kettle'\. Nearest: electric-kettle"):
        build().solution("kettle")
    with pytest.raises(UnknownNameError):
        build().pairs(8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Slow tea"', "", "problem slow_tea lacks title"),
        ('title = "Slow tea"', "title = 3", "title must be a text that is not empty; got 3"),
        ('title = "Slow tea"', 'title = " "', "title must be a text that is not empty; got ''"),
        ('category = "Kitchen"', 'category = "Kitchen"\ncolour = "red"', "unknown keys: colour"),
        ("number = 7", "number = 0", "number must be a whole number from 1 to 99; got 0"),
        ("number = 7", "number = true", "number must be a whole number from 1 to 99; got True"),
        ('slug = "slow_tea"', 'slug = "Slow-Tea"', "slug must be lower-case words joined by underscores"),
        ('text = "Helps when faster."', "", "criterion lacks text"),
        ('metric = "latency_s"', "", "has at, better, compare, margin but lacks metric"),
        ('metric = "latency_s"', 'metric = "Latency s"', "metric must be the name of a metric"),
        ("at = 16", 'at = "first"', "at must be a number or \"last\"; got 'first'"),
        ('better = "lower"', 'better = "less"', "better must be one of lower, higher; got 'less'"),
        ('compare = "ratio"', 'compare = "quotient"', "compare must be one of ratio, difference"),
        ("margin = 0.1", "margin = -0.1", "margin must be a number, 0 or more; got -0.1"),
        ("margin = 0.1", "margin = nan", "margin must be a number, 0 or more; got nan"),
        ("margin = 0.1", "margin = 0.1\nnorm = 2", "criterion has unknown keys: norm"),
        ("year = 2017", "year = 17", "year must be a whole number from 1900 to 2100; got 17"),
        ("arXiv:1706.03762", "arxiv:1706.03762", "references 1: id must be like"),
        ("arXiv:1706.03762", "arXiv:17.03762", "id must be like"),
        ("arXiv:1706.03762", "ArXiv 2017", "id must be like"),
        ("arXiv:1706.03762", "doi:1145/149", "id must be like"),
        ("arXiv:1706.03762", "somewhere", "id must be like"),
        ("[[problem.references]]", "[problem.references]", "references must be a list of tables"),
        ("[[problem]]", "[[problem]", "problems.toml is not valid TOML"),
        ("[[problem]]", "[[poem]]", "problem must be a list of tables"),
        ("[problem.criterion]", "[problem.criteria]", "lacks criterion"),
    ],
)
def test_malformed_problems_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message.replace("[", r"\[")):
        build(changed(PROBLEM, old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('slug = "electric-kettle"', 'slug = "electric_kettle"', "slug must be lower-case words joined by hyphens"),
        ('role = "attention"', 'role = "drinks"', "role must be one of attention, position"),
        ('how = "It heats."', "", "solution electric-kettle lacks how"),
        ('how = "It heats."', 'how = "It heats."\nwhy = "?"', "unknown keys: why"),
        ("solutions.kettle:Kettle", "solutions/kettle.py", 'code must be "module:attribute"'),
        ("solutions.kettle:Kettle", "solutions.kettle", 'code must be "module:attribute"'),
        ('code = "solutions.kettle:Kettle"', "code = [3]", 'code must be "module:attribute".*got 3'),
        ('code = "solutions.kettle:Kettle"', 'example = "1 + 1"', "has an example but no code"),
        ("problem = 7", "problem = 8", r"problem must be the number of a problem \(7\); got 8"),
        ('claim = "Faster."', "", "treats 1 lacks claim"),
        ('choose = "when thirsty."', 'choose = "If thirsty."', 'choose must be a text that starts with "when"'),
        ('choose = "when thirsty."', 'choose = "when thirsty."\nplace = 0', "place must be a whole number"),
        ("[[solution.treats]]", "[[solution.heals]]", "lacks treats"),
        ("[[solution]]", "[solution]", "not valid TOML|solution must be a list of tables"),
    ],
)
def test_malformed_solutions_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        build(solution=changed(SOLUTION, old, new))


def test_lists_hold_tables_only() -> None:
    with pytest.raises(CatalogueError, match=r"problems.toml, problem 1 must be a table; got 3"):
        build("problem = [3]")


def test_a_pairs_criterion_is_whole_where_the_problem_has_none() -> None:
    words = PROBLEM[: PROBLEM.index("metric")] + PROBLEM[PROBLEM.index("[[problem.references]]") :]
    with pytest.raises(CatalogueError, match="has metric but lacks better, compare, margin"):
        build(words, SOLUTION + '[solution.treats.criterion]\nmetric = "energy_j"\n')


@pytest.mark.parametrize(
    ("problems", "solutions", "message"),
    [
        (PROBLEM * 2, SOLUTION, "problem number 7 occurs twice"),
        (PROBLEM + PROBLEM.replace("number = 7", "number = 8"), SOLUTION, "problem slug slow_tea occurs twice"),
        (PROBLEM, SOLUTION * 2, "solution slug electric-kettle occurs twice"),
        (PROBLEM, SOLUTION + SOLUTION[SOLUTION.index("[[solution.treats]]") :], "pair 07/electric-kettle occurs twice"),
    ],
)
def test_nothing_occurs_twice(problems: str, solutions: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        build(problems, solutions)


def verdicts(**changes: object) -> str:
    outcome = {"verdict": "helps", "gain": "4x less time", "cost": ""}
    return json.dumps({"scale": "standard", "date": "2026-01-31", "pairs": {"07/electric-kettle": outcome}} | changes)


def test_a_verdict_makes_a_pair_measured() -> None:
    catalogue = build(verdicts=verdicts())
    (pair,) = catalogue.pairs("slow_tea")
    assert (catalogue.scale, catalogue.date) == ("standard", "2026-01-31")
    assert (pair.status, pair.verdict) == ("measured", "helps")
    assert pair.outcome is not None
    assert (pair.outcome.gain, pair.outcome.cost) == ("4x less time", "")


def test_there_may_be_no_verdicts_yet() -> None:
    catalogue = build(verdicts=verdicts(date="", pairs={}))
    assert (catalogue.scale, catalogue.date) == ("standard", "")


OUTCOME = {"verdict": "helps", "gain": "", "cost": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "verdicts.json is not valid JSON"),
        ("[]", "verdicts.json must be a table"),
        ("{}", "lacks pairs"),
        (verdicts(scale="huge"), "scale must be one of quick, standard, full; got 'huge'"),
        (verdicts(date="yesterday"), "date must be like"),
        (verdicts(date=""), "date must be like"),
        (verdicts(author="me"), "unknown keys: author"),
        (json.dumps({"pairs": {"07/electric-kettle": OUTCOME}}), "lacks scale"),
        (verdicts(pairs={"07/kettle": OUTCOME}), "verdicts on 07/kettle: no such pair"),
        (verdicts(pairs={"07/electric-kettle": OUTCOME | {"verdict": "perhaps"}}), "verdict must be one of helps"),
        (verdicts(pairs={"07/electric-kettle": {"verdict": "helps"}}), "lacks gain"),
        (verdicts(pairs={"07/electric-kettle": OUTCOME | {"p": 0.1}}), "unknown keys: p"),
    ],
)
def test_malformed_verdicts_are_refused(text: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        build(verdicts=text)


def test_no_verdict_without_a_criterion_that_can_be_applied() -> None:
    words = PROBLEM[: PROBLEM.index("metric")] + PROBLEM[PROBLEM.index("[[problem.references]]") :]
    with pytest.raises(CatalogueError, match="its criterion names no metric"):
        build(words, verdicts=verdicts())


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Pretends that a package with one entry point is installed."""

    def install(kind: str, function: object = None, value: str = f"{__name__}:provided") -> Catalogue:
        group = f"transformer_problems.{kind}"
        monkeypatch.setattr(sys.modules[__name__], "provided", function, raising=False)
        entry = EntryPoint(name="tea", value=value, group=group)
        monkeypatch.setattr(reader, "entry_points", lambda *, group: [entry] if group == entry.group else [])
        load_catalogue.cache_clear()
        return load_catalogue()

    yield install
    load_catalogue.cache_clear()


def test_packages_add_problems_and_solutions(install) -> None:
    catalogue = install("solutions", lambda: SOLUTION)
    assert catalogue.pairs(7)[-1].solution.slug == "electric-kettle"
    assert len(catalogue.treatments) == 78
    catalogue = install("problems", lambda: changed(PROBLEM, "number = 7", "number = 19"))
    assert catalogue.problem("slow_tea").number == 19
    assert len(catalogue.problems) == 19


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1 / 0, "fails with ZeroDivisionError"),
        ("not a function", "fails with TypeError"),
        (lambda: 3, "must return the text of a TOML file; got int"),
        (lambda: "[[", "is not valid TOML"),
        (lambda: SOLUTION.replace("problem = 7", "problem = 70"), "electric-kettle, treats 1: problem must be"),
    ],
)
def test_a_broken_package_is_named(install, function: object, message: str) -> None:
    with pytest.raises(CatalogueError, match=rf"package .*test_reader .*{message}"):
        install("solutions", function)


def test_a_package_that_cannot_be_imported_is_named(install) -> None:
    with pytest.raises(CatalogueError, match=r"package no_such_package .*fails with ModuleNotFoundError"):
        install("solutions", value="no_such_package:toml")
