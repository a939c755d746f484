"""The Markdown page: a row per arm, every verdict, and planned problems that say so."""

from dataclasses import replace
from pathlib import Path

from report_samples import generalization, quadratic, shelf

from transformer_problems.report.pages import problem_page, write_problem_page

SHELF = shelf()


def table_rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("|")][2:]


def test_table_has_a_row_per_arm_with_as_many_cells_as_headings() -> None:
    for summary, problem in ((quadratic(), SHELF.problems[0]), (generalization(), SHELF.problems[2])):
        page = problem_page(summary, problem, SHELF)
        rows = table_rows(page)
        assert len(rows) == len(summary.rows)
        assert {row.count("|") for row in rows} == {len(summary.columns) + 5}
        assert all(row.arm.label in line for row, line in zip(summary.rows, rows, strict=True))


def test_page_tells_finding_verdicts_criterion_notes_and_neighbours() -> None:
    summary = quadratic()
    page = problem_page(summary, SHELF.problems[0], SHELF)
    assert summary.finding in page
    assert "![Quadratic complexity" in page
    assert "### Longformer: helps" in page
    assert SHELF.problems[0].criterion.text in page
    assert f"### What to know about these figures\n\n- {summary.notes[0]}\n" in page
    assert "What to know" not in problem_page(replace(summary, notes=()), SHELF.problems[0], SHELF)
    assert "[02 No positional awareness →](../02_no_positional_awareness/README.md)" in page
    assert "https://arxiv.org/abs/2004.05150" in page
    assert "from transformer_problems import SelfAttention" in page


def test_variants_stand_beside_the_arm_that_leads_their_solution() -> None:
    page = problem_page(quadratic(), SHELF.problems[0], SHELF)
    section = page[page.index("### Sparse, strided") : page.index("### Longformer")]
    assert section.count("- **Variant.** Sparse, fixed, ") == page.count("- **Variant.**") == 1
    assert "x less time at 8,192 tokens (21 to 25); 0.12 bits/byte more after equal steps" in section


def test_a_pair_with_a_criterion_of_its_own_shows_it() -> None:
    own = replace(SHELF.problems[0].criterion, text="Memory falls by a tenth.")
    pairs = tuple(replace(p, criterion=own) if p.solution.slug == "flash-attention" else p for p in SHELF.treatments)
    page = problem_page(quadratic(), SHELF.problems[0], replace(SHELF, treatments=pairs))
    assert page.count("- **Criterion here.** Memory falls by a tenth.") == 1
    assert "Criterion here" not in problem_page(quadratic(), SHELF.problems[0], SHELF)


def test_a_pair_with_an_example_of_its_own_shows_it() -> None:
    pairs = tuple(replace(p, example="1 + 1") if p.solution.slug == "flash-attention" else p for p in SHELF.treatments)
    page = problem_page(quadratic(), SHELF.problems[0], replace(SHELF, treatments=pairs))
    assert page.count("```python\n1 + 1\n```") == 1


def test_what_few_seeds_leave_out_of_the_intervals_is_said() -> None:
    summary = quadratic()
    for num_seeds, note in ((1, "leave out how much seeds differ"), (3, "about 89% of the time at three"), (5, "")):
        page = problem_page(replace(summary, num_seeds=num_seeds), SHELF.problems[0], SHELF)
        assert note in page
        assert ("89%" in page) == (num_seeds == 3)


def test_an_arm_not_tried_yet_is_said_to_be_so_and_not_unrunnable() -> None:
    summary = quadratic()
    rows = tuple(replace(r, verdict=None, gain="", cost="") if r.arm.slug == "longformer" else r for r in summary.rows)
    page = problem_page(replace(summary, rows=rows), SHELF.problems[0], SHELF)
    assert "### Longformer: not measured yet" in page
    assert "not runnable" not in page
    assert any("Longformer" in row and "| not measured yet |" in row for row in table_rows(page))


def test_a_planned_problem_says_planned_and_shows_no_picture(tmp_path: Path) -> None:
    path = write_problem_page(None, SHELF.problems[1], SHELF, tmp_path / "new")
    page = path.read_text(encoding="utf-8")
    assert path.name == "README.md"
    assert "this problem is planned" in page
    assert "### RoPE: planned" in page
    assert "problem.png" not in page
    assert not table_rows(page)


def test_pages_have_no_runs_of_blank_lines() -> None:
    without_notes = replace(quadratic(), notes=())
    for summary, problem in ((quadratic(), 0), (without_notes, 0), (None, 1)):
        page = problem_page(summary, SHELF.problems[problem], SHELF)
        assert "\n\n\n" not in page
        assert page.endswith("\n")
        assert not page.endswith("\n\n")
