"""How a number is written, everywhere: significant digits, thousands separators, intervals, bytes."""

import math

from transformer_problems.core.records import Interval
from transformer_problems.core.summaries import Column, Row

ABSENT, NOT_YET = "–", "not measured yet"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SI_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_PLAIN_FROM, _PLAIN_TO = 1e-4, 1e7


def format_number(value: float, digits: int = 3) -> str:
    """`value` at `digits` significant digits; whole parts are never rounded away, so 8192 stays "8,192"."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value and not _PLAIN_FROM <= abs(value) < _PLAIN_TO:
        return _scientific(value, digits)
    return _fixed(value, _decimals(value, digits))


def format_estimate(estimate: Interval, digits: int = 3) -> str:
    """An estimate with its bounds: "3.9 ±0.1", or "3.9 (3.7 to 4.2)" where the two sides differ.

    Exact results (both bounds on the value) come without bounds; decimals that the interval makes
    meaningless are dropped.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if low == value == high:
        return f"{int(value):,}" if value.is_integer() and abs(value) < _PLAIN_TO else format_number(value, digits)
    if not all(map(math.isfinite, (value, low, high))):
        return f"{format_number(value, digits)} ({format_number(low, digits)} to {format_number(high, digits)})"
    largest = max(abs(value), abs(low), abs(high))
    if not _PLAIN_FROM <= largest < _PLAIN_TO:
        return f"{format_number(value, digits)} ({format_number(low, digits)} to {format_number(high, digits)})"
    below, above = value - low, high - value
    widest = max(below, above)
    most = _decimals(value or widest, digits)
    if abs(above - below) > 0.25 * widest:
        decimals = min(most, _decimals(min(below, above) or widest, 1))
        return f"{_fixed(value, decimals)} ({_fixed(low, decimals)} to {_fixed(high, decimals)})"
    decimals = min(most, _decimals(widest, 1))
    error = _fixed(widest, decimals)
    resolution = _fixed(10.0**-decimals, decimals)
    return f"{_fixed(value, decimals)} ±{error if float(error.replace(',', '')) else f'<{resolution}'}"


def format_bytes(value: float, digits: int = 3) -> str:
    """Bytes in the binary unit that keeps the number short, e.g. "64 MiB"."""
    if not math.isfinite(value):
        return _not_finite(value)
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY_UNITS) - 1:
        value, power = value / 1024, power + 1
    text = format_number(value, digits)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {_BINARY_UNITS[power]}"


def format_amount(value: float) -> str:
    """A large count in three digits: "22.7M"."""
    for size, unit in _SI_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return format_number(value)


def format_reading(estimate: Interval, unit: str) -> str:
    """What a check-up read, with its interval and unit: "8.1% ±0.3", "0.21 s"."""
    if unit == "%":
        as_percent = Interval(*(100 * bound for bound in (estimate.value, estimate.low, estimate.high)))
        number, _, spread = format_estimate(as_percent, 3).partition(" ")
        return f"{number}%" + (f" {spread}" if spread else "")
    return format_estimate(estimate) + ("" if unit == "1" else f" {unit}")


def format_limit(value: float, unit: str) -> str:
    """A threshold as short as it can be said: "25%", "0.1 s"."""
    number = f"{100 * value if unit == '%' else value:,.2g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{number}%" if unit == "%" else number + ("" if unit == "1" else f" {unit}")


def format_interval(estimate: Interval | None, column: Column) -> str:
    """One cell of a measured table; a metric named `..._bytes` is written in binary units."""
    if estimate is None:
        return ABSENT
    if math.isnan(estimate.value):
        return "diverged"
    if column.statistic == "exponent" or not is_bytes(column.metric):
        return format_estimate(estimate, column.digits)
    text = format_bytes(estimate.value, column.digits)
    if estimate.low == estimate.value == estimate.high:
        return text
    return f"{text} ({format_bytes(estimate.low, column.digits)} to {format_bytes(estimate.high, column.digits)})"


def format_verdict(row: Row) -> str:
    """The word of a row's verdict, or why it was not asked for; baselines and controls have none."""
    if row.verdict is not None:
        return row.verdict.word
    if row.not_asked:
        return row.not_asked
    return ABSENT if row.arm.solution is None else NOT_YET


def format_tick(value: float, metric: str = "") -> str:
    """A tick label: as short as the value allows."""
    if is_bytes(metric):
        return format_bytes(value)
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else _not_finite(value)
    if abs(value) < 1e-3:
        return _scientific(value, 1)
    for size, unit in _SI_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}".replace("-", "−")
    return f"{value:,.6g}".replace("-", "−")


def format_count(amount: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def is_bytes(metric: str) -> bool:
    """Whether a metric's name says that it counts bytes."""
    return metric == "bytes" or metric.endswith("_bytes")


def _decimals(value: float, digits: int) -> int:
    if value == 0:
        return 0
    exponent = int(f"{abs(value):.{digits - 1}e}".split("e")[1])
    return max(0, digits - 1 - exponent)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.replace("-", "")


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if digits == 1 and mantissa == "1" else f"{mantissa.replace('-', '−')} × {power}"


def _not_finite(value: float) -> str:
    return "undefined" if math.isnan(value) else "∞" if value > 0 else "−∞"
