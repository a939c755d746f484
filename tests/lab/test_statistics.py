"""Intervals: degenerate cases, known answers, and coverage on simulated data."""

import math

import numpy as np
import pytest

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval
from transformer_problems.lab import statistics
from transformer_problems.lab.statistics import fit_exponent, mean_interval, paired_difference, paired_ratio

ROUNDING = 1e-12  # float64 sums and logs of a few numbers


def test_a_single_value_is_its_own_interval():
    assert mean_interval([[3.5]]) == Interval(3.5, 3.5, 3.5)
    assert paired_difference([[1.0]], [[3.0]]) == Interval(2.0, 2.0, 2.0)


def test_differences_are_treated_minus_baseline():
    interval = paired_difference([[1.0, 2.0], [3.0, 4.0]], [[2.5, 3.5], [4.5, 5.5]])
    assert interval == Interval(1.5, 1.5, 1.5)


def test_ratios_are_treated_over_baseline_by_geometric_mean():
    interval = paired_ratio([[1.0, 1.0]], [[2.0, 8.0]])
    assert interval.value == pytest.approx(4.0, rel=ROUNDING)
    assert 2.0 - ROUNDING <= interval.low < interval.value < interval.high <= 8.0 + ROUNDING


def test_a_ratio_turned_round_is_its_inverse():
    """Exact but for the percentile's rank, which interpolates at mirrored places: bounds swap."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(1, 2, (2, 3, 10))
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert there.value * back.value == pytest.approx(1.0, rel=ROUNDING)
    assert there.low * back.high == pytest.approx(1.0, rel=ROUNDING)
    assert there.high * back.low == pytest.approx(1.0, rel=ROUNDING)


def test_the_same_data_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=(3, 20))
    assert mean_interval(values) == mean_interval(values)


def test_the_interval_holds_the_estimate_even_for_skewed_data():
    values = np.zeros((1, 40))
    values[0, 0] = 1e6
    interval = mean_interval(values)
    assert interval.low <= interval.value <= interval.high


def test_one_seed_resamples_its_examples():
    values = np.random.default_rng(0).normal(size=(1, 400))
    interval = mean_interval(values)
    normal_half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    # The percentile's own noise at 2,000 resamples is about 4% of the half-width; 15% is loose.
    assert interval.high - interval.value == pytest.approx(normal_half, rel=0.15)
    assert interval.value - interval.low == pytest.approx(normal_half, rel=0.15)


def test_spread_between_seeds_counts_even_where_examples_agree():
    values = np.repeat(np.arange(5.0)[:, None], 30, axis=1)
    interval = mean_interval(values)
    student_half = 2.776 * np.arange(5.0).std(ddof=1) / math.sqrt(5)  # t of four degrees of freedom
    assert interval.high - interval.low == pytest.approx(2 * student_half, rel=0.15)


def test_chunked_draws_cover_every_resample(monkeypatch):
    values = np.random.default_rng(0).normal(size=(2, 50))
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "_CHUNK", 700)  # 7 resamples at a time, which does not divide 2,000
    chunked = mean_interval(values)
    assert chunked.value == whole.value
    assert chunked.high - chunked.low == pytest.approx(whole.high - whole.low, rel=0.15)


@pytest.mark.parametrize(
    ("num_seeds", "num_examples", "seed_spread"), [(1, 60, 0.0), (20, 10, 1.0), (5, 20, 0.1)], ids=str
)
def test_nominal_95_percent_covers_about_95_percent(num_seeds, num_examples, seed_spread):
    """200 simulated studies of a mean that is zero; three standard errors of 95% are 4.6 points."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        seeds = rng.normal(scale=seed_spread, size=(num_seeds, 1))
        interval = mean_interval(seeds + rng.normal(size=(num_seeds, num_examples)))
        hits += interval.low <= 0 <= interval.high
    assert 0.90 <= hits / 200 <= 0.996


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_few_and_differing_seeds_are_not_overrated(num_seeds):
    """Plain percentiles would cover 74% at three seeds and 84% at five; 200 studies, three standard errors."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        interval = mean_interval(rng.normal(size=(num_seeds, 1)) + rng.normal(size=(num_seeds, 20)))
        hits += interval.low <= 0 <= interval.high
    assert hits / 200 >= (0.82 if num_seeds == 3 else 0.90)


def test_pairing_finds_a_shift_that_two_separate_intervals_would_not():
    rng = np.random.default_rng(3)
    baseline = rng.normal(scale=5.0, size=(3, 50))
    treated = baseline + 0.1 + rng.normal(scale=0.1, size=baseline.shape)
    before, after = mean_interval(baseline), mean_interval(treated)
    assert before.low < after.high and after.low < before.high  # they overlap widely
    assert paired_difference(baseline, treated).low > 0


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_exact_power_law_has_an_exact_exponent(exponent, repeats):
    x = np.array([128.0, 256, 512, 1024])
    interval = fit_exponent(x, np.tile(3.0 * x**exponent, (repeats, 1)))
    assert interval.value == pytest.approx(exponent, abs=ROUNDING)
    assert interval.high - interval.low == pytest.approx(0.0, abs=1e-11)  # rounding times t(0.975, 2) = 4.3, twice


def test_constant_factors_between_repeats_do_not_change_the_exponent():
    x = np.array([1.0, 2, 4, 8])
    interval = fit_exponent(x, np.outer([1.0, 5.0, 9.0], x**1.5))
    assert interval.value == pytest.approx(1.5, abs=ROUNDING)
    assert interval.high - interval.low == pytest.approx(0.0, abs=1e-11)


def test_the_exponent_interval_is_the_textbook_one():
    """Three points, logs (0, 0), (1, 1.5), (2, 2): slope 1, residuals -1/6, 1/3, -1/6, one degree of freedom."""
    x, y = np.exp([0.0, 1.0, 2.0]), np.exp([[0.0, 1.5, 2.0]])
    half = math.tan(0.95 * math.pi / 2) * math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2)  # t with one df is Cauchy
    interval = fit_exponent(x, y)
    assert interval.value == pytest.approx(1.0, abs=ROUNDING)
    assert interval.high - interval.value == pytest.approx(half, rel=1e-9)


def test_the_exponent_interval_covers_about_95_percent():
    rng = np.random.default_rng(11)
    x = np.array([128.0, 256, 512, 1024, 2048])
    hits = 0
    for _ in range(400):
        interval = fit_exponent(x, x**2 * np.exp(rng.normal(scale=0.1, size=(3, 5))))
        hits += interval.low <= 2 <= interval.high
    assert 0.915 <= hits / 400 <= 0.985  # three standard errors


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], 3.0, [[[1.0]]]])
def test_values_must_be_seeds_by_examples(values):
    with pytest.raises(ArgumentError, match=r"values must be \[seeds, examples\]"):
        mean_interval(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_must_be_finite(bad):
    with pytest.raises(ArgumentError, match="values must be finite"):
        mean_interval([[1.0, bad]])


def test_pairs_must_match():
    with pytest.raises(ArgumentError, match=r"\(1, 2\) and \(2, 1\)"):
        paired_difference([[1.0, 2.0]], [[1.0], [2.0]])


def test_ratios_need_positive_values():
    with pytest.raises(ArgumentError, match=r"treated must be positive; got 0\.0"):
        paired_ratio([[1.0]], [[0.0]])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [[1.0, 2.0]], "three different values"),
        ([1, 1, 2], [[1.0, 2.0, 3.0]], "three different values"),
        ([1, 2, 4], [[1.0, 2.0]], r"y must be \[repeats, len\(x\)\]"),
        ([0, 1, 2], [[1.0, 2.0, 3.0]], "x must be positive"),
        ([1, 2, 4], [[1.0, -2.0, 3.0]], "y must be positive"),
    ],
)
def test_exponents_need_three_positive_points(x, y, message):
    with pytest.raises(ArgumentError, match=message):
        fit_exponent(x, y)
