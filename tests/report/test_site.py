"""The site: complete, well-formed, self-contained, escaped, and every number leads to its records."""

import csv
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import generalization, quadratic, records, shelf

from transformer_problems.report import write_report
from transformer_problems.report.story import headline, leading_rows, pairs_best_first

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.open_tags = path, list[str]()
        self.links, self.assets, self.ids, self.tags, self.words = [], [], set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if given.get("id"):
            assert given["id"] not in self.ids, given["id"]
            self.ids.add(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        else:
            self.assets += [given[name] for name in ("src", "href", "xlink:href", "srcset") if name in given]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    summaries = {1: quadratic(), 9: generalization()}
    known = {number: records(summary) for number, summary in summaries.items()}
    assert write_report(folder, shelf(), summaries, known) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in site.rglob("*.html")}


def test_every_problem_has_a_page_and_measured_ones_have_records(site: Path, pages: dict[str, Page]) -> None:
    assert "index.html" in pages
    for problem in shelf().problems:
        home = site / problem.folder
        assert f"{problem.folder}/index.html" in pages
        for name in ("problem.png", "problem.svg", "records.csv", "records.html"):
            assert (home / name).exists() == (problem.number != 2), name


def test_pages_are_self_contained(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert not page.tags & {"script", "iframe", "object", "embed", "img"}, name
        assert all(asset.startswith(("#", "data:")) for asset in page.assets), name
        style = page.path.read_text(encoding="utf-8")
        assert "@import" not in style
        assert "url(http" not in style


def test_every_link_inside_the_site_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    for page in pages.values():
        for link in page.links:
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            path = (page.path.parent / target).resolve() if target else page.path
            assert path.exists(), link
            assert not anchor or anchor in pages[str(path.relative_to(site.resolve()))].ids, link


def test_numbers_link_to_the_records_they_were_made_from(pages: dict[str, Page]) -> None:
    links = pages["01_quadratic_complexity/index.html"].links
    assert links.count("records.html#flash.latency_s") == 2  # seconds, and their exponent


def test_the_measured_table_holds_figures_and_the_words_stand_below(site: Path) -> None:
    page = (site / "09_length_generalization" / "index.html").read_text(encoding="utf-8")
    table, below = page.partition("<table>")[2].split("</table>")
    said = [row for row in generalization().rows if row.gain]
    assert any(not row.arm.lead for row in said)
    for row in said:
        assert row.gain not in table
        assert row.gain in below
    assert "What it" not in table


def test_a_card_shows_three_solutions_and_every_one_that_does_harm(pages: dict[str, Page]) -> None:
    told = pairs_best_first(shelf(), shelf().problems[0], leading_rows(quadratic()))
    assert len(headline(told)) == 3
    assert len(told) > 4
    for word in ("hurts", "diverged"):
        harmful = [*told[:-1], (told[-1][0], word, told[-1][2])]
        assert headline(harmful) == [*told[:3], harmful[-1]]


def test_notes_stand_under_a_heading_of_their_own(pages: dict[str, Page]) -> None:
    words = pages["01_quadratic_complexity/index.html"].words
    assert quadratic().notes[0] in words[words.index("What to know about these figures") :]
    assert "What to know about these figures" not in pages["09_length_generalization/index.html"].words


def test_the_picture_leads_to_its_full_size(pages: dict[str, Page]) -> None:
    assert "problem.svg" in pages["01_quadratic_complexity/index.html"].links


def test_the_index_names_every_machine(tmp_path: Path) -> None:
    other = replace(generalization(), environment=replace(generalization().environment, processor="Another CPU"))
    page = Page(write_report(tmp_path, shelf(), {1: quadratic(), 9: other}, {}))
    assert any("AMD EPYC 9B45 and Another CPU" in words for words in page.words)


def test_csv_holds_every_record_at_full_precision(site: Path) -> None:
    expected = records(quadratic())
    with (site / "01_quadratic_complexity" / "records.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected)
    assert [float(row["value"]) for row in rows] == [measurement.value for _, measurement in expected]
    assert [(row["arm"], int(row["seed"])) for row in rows] == [(cell.arm, cell.seed) for cell, _ in expected]


def test_texts_are_escaped(pages: dict[str, Page]) -> None:
    page = pages["01_quadratic_complexity/index.html"]
    assert "script" not in page.tags
    assert any("<script>four</script>" in words for words in page.words)  # as text
    assert any("a <window> & no more" in words for words in page.words)


def test_planned_problems_and_verdicts_are_said_in_words(pages: dict[str, Page]) -> None:
    assert "planned" in pages["02_no_positional_awareness/index.html"].words
    index = pages["index.html"].words
    assert {"planned", "helps"} <= set(index)
    for word in ("hurts", "no effect", "inconclusive", "not runnable here"):
        assert word in pages["09_length_generalization/index.html"].words


def test_writing_twice_gives_the_same_bytes(site: Path, tmp_path: Path) -> None:
    summaries = {1: quadratic()}
    write_report(tmp_path, shelf(), summaries, {1: records(summaries[1])})
    for path in (tmp_path / "01_quadratic_complexity").iterdir():
        assert path.read_bytes() == (site / "01_quadratic_complexity" / path.name).read_bytes(), path.name


def test_a_problem_whose_cells_all_failed_has_a_page_without_picture(tmp_path: Path) -> None:
    summary = replace(quadratic(), lines=(), finding="not measured: the worker ran out of memory")
    write_report(tmp_path, shelf(), {1: summary}, {1: []})
    page = Page(tmp_path / "01_quadratic_complexity" / "index.html")
    assert summary.finding in page.words
    assert "svg" not in page.tags
    assert not (tmp_path / "01_quadratic_complexity" / "problem.png").exists()


def test_a_site_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, shelf(), {}, {}))
    assert "transformer-problems measure" in page.words
