"""Rules that constructors share, with messages that name parameter, rule, value and remedy."""

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real

from transformer_problems.core.errors import ArgumentError


def require_positive(**values: float) -> None:
    """Raise ArgumentError unless every value is a number above zero."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ArgumentError(f"{name} must be a positive number; got {value!r}.")
        if not value > 0:
            raise ArgumentError(f"{name} must be positive; got {value}.")


def require_positive_int(**values: int) -> None:
    """Raise ArgumentError unless every value is a whole number above zero."""
    for name, value in values.items():
        if not _is_whole(value):
            raise ArgumentError(f"{name} must be a positive whole number; got {value!r}.")
        require_positive(**{name: value})


def require_not_negative(**values: int) -> None:
    """Raise ArgumentError unless every value is a whole number, zero or more."""
    for name, value in values.items():
        if not _is_whole(value):
            raise ArgumentError(f"{name} must be a whole number; got {value!r}.")
        if value < 0:
            raise ArgumentError(f"{name} must not be negative; got {value}. Use 0 for none.")


def require_whole_numbers(**values: Sequence[int]) -> None:
    """Raise ArgumentError unless every value is a tuple or list of whole numbers."""
    for name, value in values.items():
        if not isinstance(value, tuple | list) or not all(map(_is_whole, value)):
            raise ArgumentError(f"{name} must be a tuple of whole numbers; got {value!r}.")


def require_sizes(name: str, sizes: Sequence[int], axes: Sequence[str]) -> None:
    """Raise ArgumentError unless `sizes` is a tuple or list of a positive whole number for each axis."""
    if (
        not isinstance(sizes, tuple | list)
        or len(sizes) != len(axes)
        or not all(_is_whole(size) and size > 0 for size in sizes)
    ):
        raise ArgumentError(
            f"{name} must be ({', '.join(axes)}) in positive whole numbers; got {sizes!r}. "
            f"Pass e.g. {name}=({', '.join(['32'] * len(axes))})."
        )


def require_flag(**values: bool) -> None:
    """Raise ArgumentError unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False; got {value!r}. Pass {name}=True or {name}=False.")


def require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raise ArgumentError unless `value` is a multiple of `of`, naming the divisors that would do."""
    require_positive_int(**{name: value, of_name: of})
    if value % of:
        divisors = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
        raise ArgumentError(
            f"{name} must be a multiple of {of_name}; got {value} and {of}. Choose {of_name} from {divisors}."
        )


def require_multiple_of(name: str, value: int, step: int, reason: str) -> None:
    """Raise ArgumentError unless `value` is a multiple of the fixed `step`, naming the nearest that would do."""
    require_positive_int(**{name: value})
    if value % step:
        below = value - value % step
        nearest = f"{below} or {below + step}" if below else str(step)
        raise ArgumentError(f"{name} must be a multiple of {step}, {reason}; got {value}. Choose {nearest}.")


def require_finite(**values: float) -> None:
    """Raise ArgumentError unless every value is a finite number."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
            raise ArgumentError(f"{name} must be a finite number; got {value!r}.")


def require_share(**values: float) -> None:
    """Raise ArgumentError unless every value is a number from 0 to 1."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ArgumentError(f"{name} must be a share from 0 to 1; got {value!r}.")


def require_share_below_one(**values: float) -> None:
    """Raise ArgumentError unless every value is a number from 0 to below 1."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
            raise ArgumentError(f"{name} must be a share from 0 to below 1; got {value!r}.")


def require_share_or_count(name: str, value: float, most: float) -> None:
    """Raise ArgumentError unless `value` is a share up to `most`, as a float, or a count from 1, as an int."""
    is_share = isinstance(value, float) and 0 < value <= most
    if not is_share and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ArgumentError(
            f"{name} must be a share in (0, {most:g}] (a float) or a count from 1 (an int); got {value!r}."
        )


def _is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False, which Python counts among them, are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
