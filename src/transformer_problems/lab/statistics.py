"""Estimates with 95% intervals: means, paired effects, and exponents of power laws."""

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval

Samples = npt.NDArray[np.float64]

_NUM_RESAMPLES = 2_000
_CHUNK = 2**22  # draws held at once: 32 MiB of indices


def mean_interval(values: npt.ArrayLike) -> Interval:
    """Mean and expanded 95% percentile interval of a hierarchical bootstrap.

    Each of 2,000 resamples draws seeds with replacement, then examples with replacement within each seed drawn,
    so the interval holds the spread of training and of testing both. One seed leaves the examples as the only
    source of spread, one example a seed leaves the seeds; a single value gives low = high = value. The draws
    are the same on every call.

    Resampling few seeds shows too little spread, so the percentiles are moved outwards to where Student's t
    would have them. Where seeds differ as much as examples do, the interval covers 89% at three seeds and 95%
    from five on; plain percentiles would cover 74% and 84%.

    Shape:
        values: [seeds, examples].

    Raises:
        ArgumentError: If the shape is another, or a value is not finite.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13; the expansion: Hesterberg
        2015, What Teachers Should Know about the Bootstrap, arXiv:1411.5279, section 4.4.
    """
    samples = _checked("values", values)
    mean = float(samples.mean())
    low, high = np.percentile(_resampled_means(samples), _expanded_bounds(samples))
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def paired_difference(baseline: npt.ArrayLike, treated: npt.ArrayLike) -> Interval:
    """Mean of treated minus baseline with its interval; see `mean_interval`.

    Pairs are kept together, so what makes an example or seed hard for both cancels.

    Shape:
        baseline, treated: [seeds, examples], paired element by element.

    Raises:
        ArgumentError: If shapes differ or a value is not finite.
    """
    before, after = _paired(baseline, treated)
    return mean_interval(after - before)


def paired_ratio(baseline: npt.ArrayLike, treated: npt.ArrayLike) -> Interval:
    """Geometric mean of treated over baseline with its interval; see `paired_difference`.

    Raises:
        ArgumentError: If a value is not positive: a ratio has no meaning then.
    """
    before, after = _paired(baseline, treated)
    _require_above_zero("baseline", before)
    _require_above_zero("treated", after)
    logs = mean_interval(np.log(after / before))
    return Interval(*(float(np.exp(bound)) for bound in (logs.value, logs.low, logs.high)))


def fit_exponent(x: npt.ArrayLike, y: npt.ArrayLike) -> Interval:
    """The exponent of y ~ x^exponent with its 95% interval.

    Least squares of log y on log x, where the repeats at one x are first averaged in logs; the interval is
    Student's t on the residuals of those averages, len(x) - 2 degrees of freedom. Repeats steady the points but
    do not multiply them: what makes an exponent uncertain is how far the points stray from a line, and a
    hundred repeats at four lengths know no more of that than four lengths do. An exact power law has no
    residuals, so its interval has no width.

    Shape:
        x: [points], at least three different ones; y: [repeats, points] or [points].

    Raises:
        ArgumentError: If shapes do not match, there are fewer than three different x, or a value is not positive.
    """
    points = np.asarray(x, dtype=np.float64)
    samples = _checked("y", np.atleast_2d(np.asarray(y, dtype=np.float64)))
    if points.ndim != 1 or samples.shape[1] != len(points):
        raise ArgumentError(
            f"y must be [repeats, len(x)]; got y {samples.shape} and x {points.shape}. Give one column for each x."
        )
    if len(np.unique(points)) < 3:
        raise ArgumentError(f"x must hold three different values or more; got {points.tolist()}. Measure more of them.")
    _require_above_zero("x", points)
    _require_above_zero("y", samples)
    log_x, log_y = np.log(points), np.log(samples).mean(axis=0)
    from scipy import stats  # here, as in `share_interval`

    fit = stats.linregress(log_x, log_y)
    # From the residuals themselves: linregress's stderr, by way of r, is off by 1e-8 on exact power laws.
    residuals = log_y - (fit.intercept + fit.slope * log_x)
    freedom = len(points) - 2
    error = np.sqrt((residuals**2).sum() / freedom / ((log_x - log_x.mean()) ** 2).sum())
    half = stdtrit(freedom, 0.975) * error
    return Interval(float(fit.slope), float(fit.slope - half), float(fit.slope + half))


def share_interval(successes: int, trials: int) -> Interval:
    """The share of trials that succeeded with its 95% interval, which few trials, or all alike, do not fool.

    Raises:
        ArgumentError: If there were no trials, or more successes than trials.

    Source:
        Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ArgumentError(f"successes must be from 0 to trials, of at least one; got {successes} of {trials}.")
    from scipy import stats  # here, for it takes most of a second and 60 MB that check-ups spare

    bounds = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return Interval(successes / trials, float(bounds.low), float(bounds.high))


def _expanded_bounds(samples: Samples) -> tuple[float, float]:
    """The percentiles that stand for 95% given how few seeds, or with one seed examples, were resampled."""
    num_seeds, num_examples = samples.shape
    num = num_seeds if num_seeds > 1 else num_examples
    if num == 1:
        return 2.5, 97.5
    reach = np.sqrt(num / (num - 1)) * stdtrit(num - 1, 0.975)
    tail = 100 * float(ndtr(-reach))
    return tail, 100 - tail


def _resampled_means(samples: Samples) -> Samples:
    """Mean of each resample, [resamples], a bounded number of draws at a time."""
    num_seeds, num_examples = samples.shape
    rng = np.random.default_rng(0)
    chunk = max(1, _CHUNK // samples.size)
    means = np.empty(_NUM_RESAMPLES)
    for start in range(0, _NUM_RESAMPLES, chunk):
        num = min(chunk, _NUM_RESAMPLES - start)
        seeds = rng.integers(num_seeds, size=(num, num_seeds, 1))
        examples = rng.integers(num_examples, size=(num, num_seeds, num_examples))
        means[start : start + num] = samples[seeds, examples].mean(axis=(1, 2))
    return means


def _checked(name: str, values: npt.ArrayLike) -> Samples:
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 2 or samples.size == 0:
        raise ArgumentError(
            f"{name} must be [seeds, examples] with at least one value; got shape {samples.shape}. Reshape it."
        )
    if not np.isfinite(samples).all():
        raise ArgumentError(f"{name} must be finite; got {samples[~np.isfinite(samples)][0]}. Leave failed runs out.")
    return samples


def _paired(baseline: npt.ArrayLike, treated: npt.ArrayLike) -> tuple[Samples, Samples]:
    before, after = _checked("baseline", baseline), _checked("treated", treated)
    if before.shape != after.shape:
        raise ArgumentError(
            f"baseline and treated must have one shape; got {before.shape} and {after.shape}. "
            "Keep the seeds and examples that both have."
        )
    return before, after


def _require_above_zero(name: str, values: Samples) -> None:
    if not (values > 0).all():
        raise ArgumentError(f"{name} must be positive; got {values.min()}. Compare differences, or leave it out.")
