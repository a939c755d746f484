"""The small chart of a finding: every line, named where it ends, in a page that may hold many of them."""

import re

from transformer_problems.core.findings import Curve
from transformer_problems.report.curves import draw_curve

CURVE = Curve("Share by length", "tokens", "share", ((64, 0.1), (128, 0.3)), {"blind": ((64, 0.5), (128, 0.5))})


def test_the_parts_of_two_charts_have_names_of_their_own() -> None:
    one, other = (set(re.findall(r'\bid="([^"]+)"', draw_curve(CURVE, name))) for name in ("a", "b"))
    assert one
    assert not one & other
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', draw_curve(CURVE, "a")))
    assert used <= one


def test_the_same_curve_is_drawn_the_same() -> None:
    assert draw_curve(CURVE, "a") == draw_curve(CURVE, "a")


def test_a_reader_who_sees_no_picture_is_told_its_title() -> None:
    assert 'aria-label="Share by length"' in draw_curve(CURVE, "a")


def test_values_that_no_logarithm_has_are_drawn_on_a_plain_axis() -> None:
    draw_curve(Curve("Zero", "layers", "norm", ((0, 0.0), (1, 0.0)), x_log=True, y_log=True), "a")
