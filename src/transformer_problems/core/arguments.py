"""Rules that constructors share, with messages that name parameter, rule, value and remedy."""

from transformer_problems.core.errors import ArgumentError


def require_positive(**values: float) -> None:
    """Raise ArgumentError unless every value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ArgumentError(f"{name} must be positive; got {value}.")


def require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raise ArgumentError unless `value` is a multiple of `of`, naming the divisors that would do."""
    require_positive(**{name: value, of_name: of})
    if value % of:
        divisors = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
        raise ArgumentError(
            f"{name} must be a multiple of {of_name}; got {value} and {of}. Choose {of_name} from {divisors}."
        )
