"""Labels never overlap, stay inside, and move no further than they must."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_problems.core.errors import ArgumentError
from transformer_problems.report.labels import spread

ROUNDING = 1e-9  # float64 sums of at most 20 numbers of order ten


@given(st.lists(st.tuples(st.floats(-2, 12), st.floats(0.1, 0.5)), min_size=1, max_size=20))
def test_labels_never_overlap_and_stay_inside(labels: list[tuple[float, float]]) -> None:
    targets, heights = zip(*labels, strict=True)
    centres = spread(targets, heights, 0.0, 10.0)
    stacked = sorted(zip(centres, heights, strict=True))
    assert stacked[0][0] - stacked[0][1] / 2 >= -ROUNDING
    assert stacked[-1][0] + stacked[-1][1] / 2 <= 10 + ROUNDING
    for (below, low), (above, high) in pairwise(stacked):
        assert above - below >= (low + high) / 2 - ROUNDING


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12, unique=True))
def test_labels_keep_the_order_of_their_lines(targets: list[float]) -> None:
    centres = spread(targets, [0.5] * len(targets), 0.0, 10.0)
    order = sorted(range(len(targets)), key=targets.__getitem__)
    assert [centres[i] for i in order] == sorted(centres)


def test_labels_with_room_stand_at_their_lines() -> None:
    assert spread([1.0, 5.0, 3.0], [0.5] * 3, 0.0, 10.0) == pytest.approx([1.0, 5.0, 3.0])


def test_two_labels_at_one_place_part_evenly() -> None:
    assert spread([5.0, 5.0], [1.0, 1.0], 0.0, 10.0) == pytest.approx([5.5, 4.5])


def test_labels_too_tall_for_the_space_are_refused() -> None:
    with pytest.raises(ArgumentError, match="heights must fit"):
        spread([1.0, 2.0], [1.0, 1.0], 0.0, 1.5)
