"""Verdicts: what the catalogue's criterion says of a measured arm."""

from transformer_problems.catalogue import Criterion
from transformer_problems.core.errors import DivergedError
from transformer_problems.core.records import Interval, Verdict, VerdictWord
from transformer_problems.core.summaries import Arm
from transformer_problems.lab.effects import common_x, measure_effect
from transformer_problems.lab.results import Results


def judge(
    problem: int, arm: Arm, baseline: str, criterion: Criterion, results: Results, failure: str | None
) -> Verdict | None:
    """Compare an arm with its baseline and apply the criterion.

    Args:
        failure: Why the arm's cells failed, if they did.

    Returns:
        None where it or its baseline was not tried yet, "diverged" where a seed of it did, "not runnable here" where
        nothing can be compared, "hurts" where a promised output was changed or quality lost, else the word that the
        95% interval of the effect gives.
    """
    x = common_x(results, arm.slug, baseline, criterion.metric, criterion.at)
    if diverged := results.diverged(arm.slug, criterion.metric, x):
        return Verdict(problem, arm.slug, "diverged", None, f"its {criterion.metric} {diverged}")
    without = results.diverged(baseline, criterion.metric, x)
    if failure and failure.startswith(DivergedError.__name__):
        return Verdict(problem, arm.slug, "diverged", None, failure)
    effect = measure_effect(results, arm.slug, baseline, criterion.metric, criterion.compare, x)
    if effect is None:
        if not failure and not (results.seeds_of(arm.slug) and results.seeds_of(baseline)):
            return None
        where = "" if x is None else f" at {x:,g}"
        missing = f"no {criterion.metric}{where} was measured for it and its baseline alike"
        reason = failure or (f"its baseline {without}" if without else missing)
        return Verdict(problem, arm.slug, "not runnable here", None, reason)
    changed = results.largest(arm.slug, criterion.promise)
    if changed is not None and changed > criterion.promise_limit:
        reason = f"its promise of an unchanged output is broken: {criterion.promise} {changed:.3g}"
        return Verdict(problem, arm.slug, "hurts", effect, reason)
    word, loss = verdict_word(effect, criterion), _quality_lost(arm.slug, baseline, criterion, results)
    if loss is not None:
        word = _held_to_quality(word, loss, criterion.quality_loss)
    low, high = _neutral_zone(criterion)
    spread = _spread_text(effect, results, arm.slug, baseline, criterion.metric, x)
    reason = (
        f"{criterion.metric} {criterion.compare} {effect.value:.3g}, {spread}; a {criterion.compare} between {low:.3g} "
        f"and {high:.3g} counts as no effect{_quality_text(criterion, loss, results, arm.slug, baseline)}"
        f"{f'; left out: its baseline {without}' if without else ''}"
    )
    return Verdict(problem, arm.slug, word, effect, reason)


def verdict_word(effect: Interval, criterion: Criterion) -> VerdictWord:
    """Helps or hurts where the whole interval lies beyond the margin, no effect where it lies within."""
    low, high = _neutral_zone(criterion)
    if low <= effect.low and effect.high <= high:
        return "no effect"
    if effect.high < low:
        return "helps" if criterion.better == "lower" else "hurts"
    if effect.low > high:
        return "helps" if criterion.better == "higher" else "hurts"
    return "inconclusive"


def _quality_lost(arm: str, baseline: str, criterion: Criterion, results: Results) -> Interval | None:
    """How much worse than the baseline the arm is in what must hold; None where nothing must or was measured."""
    if not criterion.quality:
        return None
    x = _quality_x(arm, baseline, criterion, results)
    change = measure_effect(results, arm, baseline, criterion.quality, "difference", x)
    if change is None or criterion.quality_better == "lower":
        return change
    return Interval(-change.value, -change.high, -change.low)


def _quality_x(arm: str, baseline: str, criterion: Criterion, results: Results) -> float | None:
    """Where the quality is read: once, or where it is measured along something, at the x that the criterion names."""
    if results.paired(arm, baseline, criterion.quality, None) is not None:
        return None
    return common_x(results, arm, baseline, criterion.quality, criterion.at)


def _held_to_quality(word: VerdictWord, loss: Interval, limit: float) -> VerdictWord:
    if loss.low > limit:
        return "hurts"
    return "inconclusive" if loss.high > limit and word != "hurts" else word


def _quality_text(criterion: Criterion, loss: Interval | None, results: Results, arm: str, baseline: str) -> str:
    if not criterion.quality:
        return ""
    if loss is None:
        return f"; {criterion.quality} was not measured"
    x = _quality_x(arm, baseline, criterion, results)
    spread = _spread_text(loss, results, arm, baseline, criterion.quality, x)
    return f"; {criterion.quality} lost {loss.value:.3g}, {spread}, of which {criterion.quality_loss:.3g} is allowed"


def _spread_text(effect: Interval, results: Results, arm: str, baseline: str, metric: str, x: float | None) -> str:
    """The interval and what it holds the spread of; a single value has none."""
    pair = results.paired(arm, baseline, metric, x)
    assert pair is not None, "an effect was measured"
    num_seeds, num_repeats = pair[0].shape
    if pair[0].size == 1:
        return "one value"
    of_repeats = f" over {num_repeats} repeats with one seed" if num_seeds == 1 else ""
    return f"95% interval {effect.low:.3g} to {effect.high:.3g}{of_repeats}"


def _neutral_zone(criterion: Criterion) -> tuple[float, float]:
    if criterion.compare == "ratio":
        return 1 / (1 + criterion.margin), 1 + criterion.margin
    return -criterion.margin, criterion.margin
