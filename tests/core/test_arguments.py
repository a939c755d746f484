"""Rules that constructors share: what they let pass, and messages that name rule, value and remedy."""

import re

import pytest

from transformer_problems.core.arguments import (
    require_finite,
    require_flag,
    require_multiple,
    require_multiple_of,
    require_not_negative,
    require_positive,
    require_positive_int,
    require_share,
    require_share_below_one,
    require_share_or_count,
    require_sizes,
    require_whole_numbers,
)
from transformer_problems.core.errors import ArgumentError


def test_good_values_pass() -> None:
    require_positive(base=0.5, size=3)
    require_positive_int(size=1)
    require_not_negative(size=0)
    require_flag(pad=False)
    require_finite(threshold=-0.5, count=2)
    require_sizes("image_size", (32, 48), ("height", "width"))
    require_sizes("grid", [3], ("steps",))
    for value in (0.5, 0.01, 1, 7):
        require_share_or_count("merge", value, 0.5)
    require_share_below_one(heads=0, neurons=0.99)
    require_whole_numbers(sizes=(1, -2), places=[0], none=())
    require_multiple("embed_dim", 12, "num_heads", 4)
    require_multiple_of("head_dim", 16, 2, "a pair of features")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: require_positive(base=0.0), "base must be positive; got 0.0."),
        (lambda: require_positive(base=float("nan")), "base must be positive; got nan."),
        (lambda: require_positive(base="1"), "base must be a positive number; got '1'."),
        (lambda: require_positive_int(size=0), "size must be positive; got 0."),
        (lambda: require_positive_int(size=2.5), "size must be a positive whole number; got 2.5."),
        (lambda: require_positive(base=True), "base must be a positive number; got True."),
        (lambda: require_positive_int(size=True), "size must be a positive whole number; got True."),
        (lambda: require_not_negative(size=False), "size must be a whole number; got False."),
        (lambda: require_whole_numbers(sizes=(1, True)), "sizes must be a tuple of whole numbers; got (1, True)."),
        (lambda: require_share(keep=True), "keep must be a share from 0 to 1; got True."),
        (lambda: require_share_below_one(heads=1.0), "heads must be a share from 0 to below 1; got 1.0."),
        (lambda: require_share_below_one(heads=None), "heads must be a share from 0 to below 1; got None."),
        (lambda: require_finite(threshold=float("inf")), "threshold must be a finite number; got inf."),
        (lambda: require_finite(threshold=False), "threshold must be a finite number; got False."),
        (lambda: require_flag(pad="no"), "pad must be True or False; got 'no'. Pass pad=True or pad=False."),
        (lambda: require_flag(pad=1), "pad must be True or False; got 1. Pass pad=True or pad=False."),
        *(
            (
                lambda sizes=sizes: require_sizes("image_size", sizes, ("height", "width")),
                f"image_size must be (height, width) in positive whole numbers; got {sizes!r}. "
                "Pass e.g. image_size=(32, 32).",
            )
            for sizes in (32, (32,), (32, 32, 3), (32, 0), (32, True), (32, 2.5), "32")
        ),
        *(
            (
                lambda value=value: require_share_or_count("merge", value, 0.5),
                f"merge must be a share in (0, 0.5] (a float) or a count from 1 (an int); got {value!r}.",
            )
            for value in (0, 0.0, 0.6, True, "1", None, float("nan"))
        ),
        (lambda: require_positive_int(size=None), "size must be a positive whole number; got None."),
        (lambda: require_not_negative(size=-1), "size must not be negative; got -1. Use 0 for none."),
        (lambda: require_not_negative(size="2"), "size must be a whole number; got '2'."),
        (
            lambda: require_whole_numbers(sizes=(1, 2.5)),
            "sizes must be a tuple of whole numbers; got (1, 2.5).",
        ),
        (lambda: require_whole_numbers(sizes="12"), "sizes must be a tuple of whole numbers; got '12'."),
        (lambda: require_whole_numbers(sizes=12), "sizes must be a tuple of whole numbers; got 12."),
        (
            lambda: require_multiple("embed_dim", 12, "num_heads", 5),
            "embed_dim must be a multiple of num_heads; got 12 and 5. Choose num_heads from 1, 2, 3, 4, 6, 12.",
        ),
        (
            lambda: require_multiple("embed_dim", 12, "num_heads", "4"),
            "num_heads must be a positive whole number; got '4'.",
        ),
        (
            lambda: require_multiple_of("head_dim", 15, 2, "a pair of features"),
            "head_dim must be a multiple of 2, a pair of features; got 15. Choose 14 or 16.",
        ),
        (
            lambda: require_multiple_of("head_dim", 1, 2, "a pair of features"),
            "head_dim must be a multiple of 2, a pair of features; got 1. Choose 2.",
        ),
    ],
)
def test_bad_values_are_named_with_the_remedy(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        call()
