"""The committed pages, the README's table and the catalogue's verdicts are what the committed results give."""

import importlib.util
from pathlib import Path

import pytest

from transformer_problems.catalogue import load_catalogue
from transformer_problems.report.pages import problem_page

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("generate_images", ROOT / "generate_images.py")
assert SPEC is not None
assert SPEC.loader is not None
generate_images = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate_images)

CATALOGUE = load_catalogue()
SUMMARIES = generate_images.committed_summaries(CATALOGUE)
REDO = "Run: python generate_images.py"


@pytest.mark.parametrize("problem", CATALOGUE.problems, ids=lambda p: p.folder)
def test_page(problem) -> None:
    folder = ROOT / "docs" / problem.folder
    expected = problem_page(SUMMARIES.get(problem.number), problem, CATALOGUE)
    assert (folder / "README.md").read_text() == expected, REDO
    assert (folder / "problem.png").exists() == (problem.number in SUMMARIES), REDO


def test_verdicts() -> None:
    assert generate_images.VERDICTS.read_text() == generate_images.verdicts_text(SUMMARIES), REDO


def test_readme_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == generate_images.with_table(readme, CATALOGUE, SUMMARIES), REDO


def test_every_measured_pair_has_a_verdict_and_every_verdict_a_measurement() -> None:
    measured = {t.key for t in CATALOGUE.treatments if t.status == "measured"}
    leads = {f"{n:02d}/{row.arm.solution}" for n, s in SUMMARIES.items() for row in s.rows if row.arm.lead}
    assert measured == leads


@pytest.mark.parametrize("number", SUMMARIES)
def test_no_column_is_empty(number: int) -> None:
    summary = SUMMARIES[number]
    empty = [c.label for i, c in enumerate(summary.columns) if all(row.cells[i] is None for row in summary.rows)]
    assert not empty, "nothing was measured at the x that these columns show"
