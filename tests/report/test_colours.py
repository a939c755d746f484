"""One colour per solution, distinct within a problem and readable on either ground."""

from transformer_problems.core.summaries import Arm
from transformer_problems.report.colours import (
    DARK_GROUND,
    PALETTE,
    VERDICT_COLOURS,
    assign_colours,
    contrast,
    dark_theme,
    readable,
    strokes,
)


def test_solutions_of_one_problem_never_share_a_colour() -> None:
    groups = [["a", "b", "c"], ["c", "d", "e", "f"], ["a", "f", "g"]]
    colours = assign_colours(groups)
    assert all(len({colours[slug] for slug in group}) == len(group) for group in groups)


def test_later_problems_leave_earlier_colours_alone() -> None:
    first = assign_colours([["a", "b"]])
    assert first.items() <= assign_colours([["a", "b"], ["b", "c"]]).items()


def test_more_solutions_than_colours_repeat_the_least_used() -> None:
    slugs = [str(i) for i in range(len(PALETTE) + 2)]
    assert len(set(assign_colours([slugs]).values())) == len(PALETTE)


def test_contrast_of_black_and_white_is_21() -> None:
    assert contrast("#000000", "#FFFFFF") == 21


def test_texts_are_readable_on_both_grounds() -> None:
    texts = [*map(readable, PALETTE), *VERDICT_COLOURS.values()]
    dark = dark_theme()
    assert min(contrast(colour, "#FFFFFF") for colour in texts) >= 4.5
    assert min(contrast(dark[colour], DARK_GROUND) for colour in texts) >= 4.5


def test_variants_share_their_solutions_colour_and_differ_in_dashes() -> None:
    arms = [Arm("base", "base"), Arm("x", "X", "s", lead=True), Arm("x2", "X2", "s"), Arm("x3", "X3", "s")]
    styles = strokes(arms, {"s": "#0072B2"})
    assert styles["x"].line == styles["x2"].line == styles["x3"].line != styles["base"].line
    assert len({styles[slug].dashes for slug in ("x", "x2", "x3")}) == 3
