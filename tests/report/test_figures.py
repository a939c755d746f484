"""The picture: nothing overlaps, nothing falls off the sheet, and the same summary draws the same bytes."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from report_samples import around, generalization, quadratic, shelf

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval
from transformer_problems.core.summaries import Line, Point, ProblemSummary
from transformer_problems.report import panels
from transformer_problems.report.colours import catalogue_colours
from transformer_problems.report.figures import WIDTH, compose, draw_problem, provenance
from transformer_problems.report.scales import x_scale, y_scale

SHELF = shelf()
HAIR = 1.0  # pixels of 1,600 by which two text boxes may touch: hinting rounds to whole pixels


def figure_of(summary: ProblemSummary) -> Figure:
    problem = next(p for p in SHELF.problems if p.number == summary.number)
    return compose(summary, problem, catalogue_colours(SHELF))


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]


def zero_on_log_axis() -> ProblemSummary:
    summary = quadratic()
    line = summary.lines[1]
    zero = tuple(Point(point.x, Interval(0.0, 0.0, 0.0)) for point in line.points)
    return replace(summary, lines=(summary.lines[0], Line(line.arm, zero), *summary.lines[2:]))


def one_point_each() -> ProblemSummary:
    summary = generalization(8)
    lines = tuple(Line(line.arm, line.points[-1:]) for line in summary.lines)
    return replace(summary, lines=lines, chart=replace(summary.chart, x_log=False))


def many_points() -> ProblemSummary:
    summary = generalization(4)
    lines = tuple(
        Line(line.arm, tuple(Point(float(x), around(2 + x / 400)) for x in range(1, 401))) for line in summary.lines
    )
    return replace(summary, lines=lines, chart=replace(summary.chart, x_log=False, better="higher"))


def long_texts() -> ProblemSummary:
    summary = quadratic()
    rows = tuple(replace(row, gain=row.gain * 4, cost=row.cost * 3) for row in summary.rows)
    return replace(summary, rows=rows, finding=summary.finding * 3)


@pytest.mark.parametrize(
    "summary",
    [
        pytest.param(generalization(3), id="3 arms"),
        pytest.param(quadratic(), id="8 arms"),
        pytest.param(generalization(14), id="14 arms"),
        pytest.param(zero_on_log_axis(), id="zero on a log axis"),
        pytest.param(one_point_each(), id="one point each"),
        pytest.param(many_points(), id="many points"),
        pytest.param(long_texts(), id="long texts"),
        pytest.param(replace(quadratic(), lines=quadratic().lines[1:]), id="baseline not measured"),
    ],
)
def test_no_two_texts_overlap_and_all_are_on_the_sheet(summary: ProblemSummary) -> None:
    figure = figure_of(summary)
    boxes = text_boxes(figure)
    assert len(boxes) > len(summary.lines)
    for (one, a), (other, b) in combinations(boxes, 2):
        shared = Bbox.intersection(a, b)
        assert shared is None or min(shared.width, shared.height) <= HAIR, f"{one!r} overlaps {other!r}"
    for text, box in boxes:
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text


def test_only_chosen_lines_are_labelled_and_leads_have_a_row() -> None:
    summary = quadratic()
    texts = [text for text, _ in text_boxes(figure_of(summary))]
    assert "Sparse, fixed" not in texts
    assert texts.count("Longformer") == 2  # its line and its row
    helping = [row for row in summary.rows if row.arm.lead and row.verdict and row.verdict.word == "helps"]
    assert texts.count("helps") == len(helping)
    assert any("AMD EPYC" in text for text in texts)


def test_text_is_large_enough_at_800_pixels() -> None:
    at_800 = 800 / (WIDTH * 72)  # pixels a point
    sizes = [t.get_fontsize() for t in figure_of(generalization()).findobj(Text) if t.get_text()]
    assert min(sizes) * at_800 >= 10


def test_drawing_twice_gives_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    summary, problem = quadratic(), SHELF.problems[0]
    draw_problem(summary, problem, SHELF, tmp_path / "a.png", tmp_path / "a.svg")
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "lines.linewidth": 7}):
        before = dict(mpl.rcParams)
        draw_problem(summary, problem, SHELF, tmp_path / "b.png", tmp_path / "b.svg")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_baseline_without_a_line_is_said_to_be_missing_not_replaced() -> None:
    summary = quadratic()
    texts = [text for text, _ in text_boxes(figure_of(replace(summary, lines=summary.lines[1:])))]
    assert "not measured" in texts
    assert summary.lines[0].arm.label not in texts


def test_lines_that_end_at_one_place_share_one_leader_and_a_bracket() -> None:
    ends = [Point(16.0, around(1.0)), Point(16.0, around(1.0)), Point(8.0, around(1.0)), Point(16.0, around(0.5))]
    assert panels._at_one_place(ends, [2.0, 1.99, 2.0, 1.0]) == [[2], [0, 1], [3]]
    summary = generalization(8)
    together = tuple(Line(line.arm, (*line.points[:-1], Point(16.0, around(3.0)))) for line in summary.lines)
    assert num_strokes(replace(summary, lines=together)) == num_strokes(summary) - len(together) + 2


def num_strokes(summary: ProblemSummary) -> int:
    """Lines on the sheet itself: leaders, brackets and the strip's, of which there are as many for equal rows."""
    return sum(isinstance(artist, Line2D) for artist in figure_of(summary).artists + figure_of(summary).lines)


def test_the_footer_tells_what_was_measured_with_fewer_seeds() -> None:
    fewer = replace(quadratic(), fewer_seeds=(("latency_s", 1),))
    assert "3 seeds (latency_s: 1) ·" in provenance(fewer)
    assert "3 seeds ·" in provenance(quadratic())


def test_the_left_panel_spans_what_its_line_was_measured_at() -> None:
    summary = quadratic()
    baseline = Line(summary.lines[0].arm, summary.lines[0].points[:3])
    left, right = (a for a in figure_of(replace(summary, lines=(baseline, *summary.lines[1:]))).axes)
    (start, end), (first, last) = left.get_xlim(), right.get_xlim()
    assert start < np.log10(128) < np.log10(512) < end < np.log10(1024)
    assert first < np.log10(128) < np.log10(8192) < last
    assert left.get_ylim() == right.get_ylim()


def test_a_linear_axis_holds_every_interval_and_begins_where_it_must() -> None:
    summary = generalization(3)
    wide = Line(summary.lines[0].arm, (Point(1.0, Interval(0.5, 0.3, 2.0)), Point(2.0, around(0.6))))
    y = y_scale(summary.chart, (wide,))
    assert 0 < y.low < 0.3 < 2.0 < y.high
    assert y_scale(replace(summary.chart, y_from=0.0), (wide,)).low == 0
    assert y_scale(replace(summary.chart, y_from=0.5), (wide,)).low == y.low


def test_an_axis_of_what_is_left_gives_every_halving_the_same_room() -> None:
    summary = generalization(3)
    line = Line(summary.lines[0].arm, tuple(Point(x, around(0.5)) for x in (0.0, 0.5, 0.75, 0.875)))
    x = x_scale(replace(summary.chart, x_log=False, x_log_rest=True), (line,), 3.0, 8.0)
    assert x.ticks == (0.0, 0.5, 0.75, 0.875)
    assert np.diff([x.fraction(tick) for tick in x.ticks]) == pytest.approx([x.fraction(0.5) - x.fraction(0.0)] * 3)


@pytest.mark.parametrize(
    ("xs", "ticks"), [((66, 132, 198, 264, 330, 396), (100, 200, 300, 400)), ((1, 2, 3), (1, 2, 3))]
)
def test_ticks_of_a_linear_axis_are_round_numbers(xs: tuple[int, ...], ticks: tuple[int, ...]) -> None:
    summary = generalization(3)
    lines = tuple(Line(line.arm, tuple(Point(float(x), around(2.0)) for x in xs)) for line in summary.lines)
    shown = x_scale(replace(summary.chart, x_log=False), lines, 3.0, 8.0).ticks
    assert set(ticks) <= set(shown)
    assert all(tick * 2 == round(tick * 2) for tick in shown)


def test_ticks_of_bytes_are_powers_of_two() -> None:
    summary = quadratic()
    lines = tuple(Line(line.arm, (Point(1.0, around(3e6)), Point(2.0, around(2e8)))) for line in summary.lines)
    ticks = y_scale(replace(summary.chart, metric="peak_memory_bytes", y_log=True), lines).ticks
    assert len(ticks) >= 3
    assert all(tick == 2 ** (int(tick).bit_length() - 1) for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(2.4, 14.0, (3, 4, 6, 8, 12)), (3.5, 9.0, (4, 6, 8)), (4.6, 7.4, (5, 6, 7)), (1.0, 40.0, (1, 2, 4, 8, 16, 32))],
)
def test_ticks_of_few_bytes_stand_on_the_axis_in_whole_units(low: float, high: float, ticks: tuple[int, ...]) -> None:
    mebibyte = 2.0**20
    line = Line(
        quadratic().lines[0].arm, tuple(Point(x, around(value * mebibyte)) for x, value in ((1.0, low), (2.0, high)))
    )
    scale = y_scale(replace(quadratic().chart, metric="peak_memory_bytes", y_log=True), (line,))
    assert scale.ticks == tuple(tick * mebibyte for tick in ticks)
    assert all(0 <= scale.fraction(tick) <= 1 for tick in scale.ticks)


@pytest.mark.parametrize("rises", [True, False])
def test_the_label_of_the_baseline_stands_clear_of_the_axis(rises: bool) -> None:
    curve = np.stack([np.linspace(0, 1, 50), np.linspace(0, 1, 50)[:: 1 if rises else -1]], axis=1) * (3.0, 2.0)
    size = np.array([1.5, 0.2])
    centre = panels._clear_spot(curve, size, np.array([3.0, 2.0]))
    assert (centre - size / 2 > 0.05).all()


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ArgumentError, match="finite point"):
        figure_of(replace(quadratic(), lines=()))


def test_a_logarithmic_axis_refuses_x_of_zero() -> None:
    summary = quadratic()
    line = summary.lines[0]
    at_zero = Line(line.arm, (Point(0.0, around(1.0)), *line.points))
    with pytest.raises(ArgumentError, match="x_log"):
        figure_of(replace(summary, lines=(at_zero,)))


def test_an_axis_of_what_is_left_refuses_x_of_one() -> None:
    summary = generalization(3)
    whole = Line(summary.lines[0].arm, (Point(0.5, around(1.0)), Point(1.0, around(1.0))))
    with pytest.raises(ArgumentError, match="x_log_rest"):
        figure_of(replace(summary, lines=(whole,), chart=replace(summary.chart, x_log=False, x_log_rest=True)))
