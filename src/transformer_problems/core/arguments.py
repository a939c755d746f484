"""Rules that constructors share, with messages that name parameter, rule, value and remedy."""

from collections.abc import Sequence
from numbers import Integral, Real

from transformer_problems.core.errors import ArgumentError


def require_positive(**values: float) -> None:
    """Raise ArgumentError unless every value is a number above zero."""
    for name, value in values.items():
        if not isinstance(value, Real):
            raise ArgumentError(f"{name} must be a positive number; got {value!r}.")
        if not value > 0:
            raise ArgumentError(f"{name} must be positive; got {value}.")


def require_positive_int(**values: int) -> None:
    """Raise ArgumentError unless every value is a whole number above zero."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ArgumentError(f"{name} must be a positive whole number; got {value!r}.")
        require_positive(**{name: value})


def require_not_negative(**values: int) -> None:
    """Raise ArgumentError unless every value is a whole number, zero or more."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ArgumentError(f"{name} must be a whole number; got {value!r}.")
        if value < 0:
            raise ArgumentError(f"{name} must not be negative; got {value}. Use 0 for none.")


def require_whole_numbers(**values: Sequence[int]) -> None:
    """Raise ArgumentError unless every value is a tuple or list of whole numbers."""
    for name, value in values.items():
        if not isinstance(value, tuple | list) or not all(isinstance(number, Integral) for number in value):
            raise ArgumentError(f"{name} must be a tuple of whole numbers; got {value!r}.")


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


def require_share(**values: float) -> None:
    """Raise ArgumentError unless every value is a number from 0 to 1."""
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ArgumentError(f"{name} must be a share from 0 to 1; got {value!r}.")
