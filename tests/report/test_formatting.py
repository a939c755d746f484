"""Numbers as a reader expects them, checked by hand."""

import math

import pytest

from transformer_problems.core.records import Interval, Verdict
from transformer_problems.core.summaries import Arm, Column, Row
from transformer_problems.report.formatting import (
    ABSENT,
    NOT_YET,
    format_amount,
    format_bytes,
    format_count,
    format_estimate,
    format_interval,
    format_limit,
    format_number,
    format_reading,
    format_tick,
    format_verdict,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.6, "2.60"),
        (0.02, "0.0200"),
        (8192.4, "8,192"),
        (-3.14159, "−3.14"),
        (9.999, "10.0"),
        (1.234e-7, "1.23 × 10⁻⁷"),
        (4.3e9, "4.30 × 10⁹"),
        (math.inf, "∞"),
        (math.nan, "undefined"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Interval(3.87, 3.77, 3.97), "3.9 ±0.1"),
        (Interval(2.62, 2.58, 2.66), "2.62 ±0.04"),
        (Interval(2.6, 2.5999, 2.6001), "2.60 ±<0.01"),
        (Interval(3.9, 3.7, 4.6), "3.9 (3.7 to 4.6)"),
        (Interval(5.0, 5.0, 5.0), "5"),
        (Interval(12345.0, 12345.0, 12345.0), "12,345"),
        (Interval(2.5, 2.5, 2.5), "2.50"),
        (Interval(0.0, -0.3, 0.3), "0.0 ±0.3"),
        (Interval(4.0, 2.0, math.inf), "4.00 (2.00 to ∞)"),
    ],
)
def test_estimate(estimate: Interval, text: str) -> None:
    assert format_estimate(estimate) == text


def test_bytes_and_cells() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(64 * 2**20) == "64 MiB"
    memory = Column("peak_memory_bytes", "peak memory")
    assert format_interval(Interval(*[2.0**30] * 3), memory) == "1 GiB"
    assert format_interval(Interval(2.0**30, 2.0**29, 2.0**31), memory) == "1 GiB (512 MiB to 2 GiB)"
    assert format_interval(None, memory) == ABSENT
    assert format_interval(Interval(math.nan, math.nan, math.nan), memory) == "diverged"
    assert format_interval(Interval(2.62, 2.58, 2.66), Column("bits_per_byte", "bits/byte")) == "2.62 ±0.04"


def test_verdicts_of_controls_and_of_arms_not_tried_yet() -> None:
    treated = Arm("flash", "Flash", "flash-attention")
    assert format_verdict(Row(treated, (), Verdict(1, "flash", "helps", None, "a reason"))) == "helps"
    assert format_verdict(Row(treated, (), None)) == NOT_YET
    assert format_verdict(Row(Arm("dense", "dense"), (), None)) == ABSENT


def test_ticks_and_counts() -> None:
    assert [format_tick(v) for v in (0, 0.5, 8192, 3e6, 2e9, 1e-5)] == ["0", "0.5", "8,192", "3M", "2G", "10⁻⁵"]
    assert format_tick(2.0**20, "kv_cache_bytes") == "1 MiB"
    assert (format_count(1, "seed"), format_count(3, "seed")) == ("1 seed", "3 seeds")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.25, "%", "25%"),
        (0.1, "s", "0.1 s"),
        (2, "1", "2"),
        (1e-6, "1", "1e-06"),
        (0.004, "%", "0.4%"),
        (3100, "1", "3,100"),
    ],
)
def test_a_threshold_is_as_short_as_can_be(value: float, unit: str, text: str) -> None:
    assert format_limit(value, unit) == text


@pytest.mark.parametrize(
    ("estimate", "unit", "text"),
    [
        (Interval(0.25, 0.25, 0.25), "%", "25%"),
        (Interval(0.25, 0.24, 0.26), "%", "25% ±1"),
        (Interval(0.031, 0.031, 0.031), "s", "0.0310 s"),
        (Interval(2.5, 2.5, 2.5), "1", "2.50"),
    ],
)
def test_a_reading_with_its_unit(estimate: Interval, unit: str, text: str) -> None:
    assert format_reading(estimate, unit) == text


def test_amounts() -> None:
    assert [format_amount(value) for value in (12, 426_752, 22_713_216, 7e9)] == ["12.0", "426,752", "22.7M", "7G"]
