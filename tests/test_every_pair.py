"""Every pair of problem and solution is done: measured, judged, on its page, and held against a reference."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from transformer_problems.catalogue import Treatment, load_catalogue
from transformer_problems.problems import has_checkup, load_experiment

ROOT = Path(__file__).parents[1]
CATALOGUE = load_catalogue()
PAIRS = [pytest.param(pair, id=pair.key) for pair in CATALOGUE.treatments]


@cache
def measured_arms(folder: str) -> frozenset[str]:
    """The arms that the committed results of a problem hold."""
    with (ROOT / "results" / f"{folder}.csv").open(newline="") as file:
        return frozenset(row["arm"] for row in csv.DictReader(file))


@cache
def imported_by_tests() -> frozenset[str]:
    """Modules of this package that the tests of solutions, models and kernels import."""
    folders = (ROOT / "tests" / name for name in ("solutions", "models", "kernels"))
    texts = [file.read_text() for folder in folders for file in folder.rglob("test_*.py")]
    return frozenset(name for text in texts for name in re.findall(r"transformer_problems\.([\w.]+)", text))


def test_there_are_77_pairs_of_18_problems() -> None:
    assert (len(CATALOGUE.treatments), len(CATALOGUE.problems)) == (77, 18)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_measured(pair: Treatment) -> None:
    leading = [arm for arm in load_experiment(pair.problem).arms if arm.lead and arm.solution == pair.solution.slug]
    assert len(leading) == 1
    assert leading[0].slug in measured_arms(pair.problem.folder)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_has_a_verdict(pair: Treatment) -> None:
    assert pair.outcome is not None
    assert pair.outcome.gain


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_stands_on_its_page(pair: Treatment) -> None:
    page = (ROOT / "docs" / pair.problem.folder / "README.md").read_text()
    assert f"### {pair.name}" in page


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_has_code_that_a_test_holds_against_a_reference(pair: Treatment) -> None:
    assert pair.code
    for path in pair.code:
        assert path.partition(":")[0] in imported_by_tests()


@pytest.mark.parametrize("problem", CATALOGUE.problems, ids=lambda problem: problem.folder)
def test_a_problem_has_a_check_up(problem) -> None:
    assert has_checkup(problem)
