"""From measurements to what a page shows: curves, table, verdicts and the words for them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from transformer_problems.catalogue import Catalogue, Criterion
from transformer_problems.core.records import Cell, Environment, Interval, Measurement, Scale, Verdict
from transformer_problems.core.summaries import Arm, Column, Line, Point, ProblemSummary, Row
from transformer_problems.lab.effects import Effect, common_x, describe_effect, measure_effect
from transformer_problems.lab.experiment import Experiment, HasNotes, ReadsData
from transformer_problems.lab.judge import judge
from transformer_problems.lab.results import Results
from transformer_problems.lab.statistics import fit_exponent, mean_interval

_DIVERGED = Interval(math.nan, math.nan, math.nan)


def summarise(
    experiment: Experiment,
    catalogue: Catalogue,
    records: Sequence[tuple[Cell, Measurement]],
    failures: Mapping[Cell, str],
    scale: Scale,
    environment: Environment,
) -> ProblemSummary:
    """Everything that the picture and page of one problem show."""
    results = Results(records)
    reasons = {cell.arm: reason for cell, reason in failures.items()}
    not_asked = experiment.not_asked(results) if isinstance(experiment, ReadsData) else {}
    asked = sorted(experiment.arms, key=lambda arm: arm.slug in not_asked)  # so that their baseline comes first
    rows = tuple(
        replace(_row(experiment, catalogue, arm, results, reasons), not_asked=not_asked.get(arm.slug, ""))
        for arm in asked
    )
    chart = experiment.chart
    if not_asked.get(experiment.arms[0].slug):
        chart = replace(chart, problem_title=asked[0].label)
    lines = tuple(line for arm in experiment.arms if (line := _line(experiment, arm, results)).points)
    told = experiment.notes(results) if isinstance(experiment, HasNotes) and results.seeds else ()
    fewer = _fewer_seeds(experiment, catalogue, results)
    failed = (f"{cell.arm}, seed {cell.seed}: {reason}" for cell, reason in failures.items())
    return ProblemSummary(
        number=experiment.problem,
        finding=_finding(experiment, asked[0], results, reasons),
        chart=chart,
        lines=lines,
        columns=experiment.columns,
        rows=tuple(_with_variants(row, rows) for row in rows),
        scale=scale,
        num_seeds=len(results.seeds),
        environment=environment,
        notes=(*told, *_seeds_told(experiment.columns, results), *failed),
        fewer_seeds=tuple(fewer.items()),
    )


def criterion_of(catalogue: Catalogue, problem: int, arm: Arm) -> Criterion:
    """The criterion of the arm's pair, or of the problem for controls."""
    pairs = {pair.solution.slug: pair for pair in catalogue.pairs(problem)}
    if arm.solution is None:
        return catalogue.problem(problem).criterion
    return pairs[arm.solution].criterion


def baseline_of(experiment: Experiment, arm: Arm) -> str | None:
    """Slug of the arm it is compared with; None for the experiment's own baseline."""
    first = experiment.arms[0].slug
    return None if arm.slug == first else arm.baseline or first


def _finding(experiment: Experiment, baseline: Arm, results: Results, reasons: Mapping[str, str]) -> str:
    """The experiment's finding, if the baseline's first seed is there: it alone measures what needs no repetition."""
    if 0 not in results.seeds_of(baseline.slug):
        return f"not measured: {reasons[baseline.slug]}" if baseline.slug in reasons else "not measured yet"
    if diverged := results.diverged(baseline.slug):
        return f"The baseline, {baseline.label}, {diverged}."
    return experiment.finding(results)


def _fewer_seeds(experiment: Experiment, catalogue: Catalogue, results: Results) -> dict[str, int]:
    """The metrics that are judged or drawn and were measured with fewer seeds than others, and with how many."""
    judged = [criterion_of(catalogue, experiment.problem, arm).metric for arm in experiment.arms if arm.solution]
    return results.with_fewer_seeds((*judged, experiment.chart.metric))


def _seeds_told(columns: Sequence[Column], results: Results) -> Iterator[str]:
    """A sentence on the columns of the table that were measured with fewer seeds than others."""
    fewer = results.with_fewer_seeds(column.metric for column in columns)
    for num in sorted(set(fewer.values())):
        labels = ", ".join(f'"{column.label}"' for column in columns if fewer.get(column.metric) == num)
        of_all = f"{num} of {len(results.seeds)} seeds"
        yield f"Measured with {of_all}, so that intervals leave out how much seeds differ: {labels}."


def _with_variants(row: Row, rows: Sequence[Row]) -> Row:
    """A leading arm's row; where the verdicts of its solution's arms differ, its gain says how many of them help."""
    words = [r.verdict.word for r in rows if r.verdict and r.arm.solution == row.arm.solution]
    if not row.arm.lead or len(set(words)) <= 1:
        return row
    num = words.count("helps")
    return replace(row, gain=f"{row.gain} ({num} of {len(words)} variants {'helps' if num == 1 else 'help'})")


def _line(experiment: Experiment, arm: Arm, results: Results) -> Line:
    metric = experiment.chart.metric
    estimates = {x: _estimate(experiment, metric, arm, results, x) for x in results.xs(arm.slug, metric)}
    points = (Point(_place(experiment, arm, results, x), estimate) for x, estimate in estimates.items() if estimate)
    return Line(arm, tuple(points))


def _place(experiment: Experiment, arm: Arm, results: Results, x: float) -> float:
    """Where a point lies: at x, or at the mean of what the chart shows in its place, infinite where that diverged."""
    if not experiment.chart.x_metric:
        return x
    samples = results.samples(arm.slug, experiment.chart.x_metric, x)
    return math.inf if samples is None else float(samples.mean())


def _estimate(experiment: Experiment, metric: str, arm: Arm, results: Results, x: float | None) -> Interval | None:
    """Mean and interval; on shared examples without the spread between easy and hard ones, which all arms have.

    Without it a sample may lie where no value can, such as beyond 100%; the interval ends where measured values do.
    """
    if metric not in experiment.shared_examples:
        samples = results.samples(arm.slug, metric, x)
        return None if samples is None else mean_interval(samples)
    eased = results.eased(arm.slug, metric, x)
    if eased is None:
        return None
    interval = mean_interval(eased)
    smallest, largest = results.range(metric)
    return Interval(*(min(max(v, smallest), largest) for v in (interval.value, interval.low, interval.high)))


def _row(experiment: Experiment, catalogue: Catalogue, arm: Arm, results: Results, reasons: Mapping[str, str]) -> Row:
    cells = tuple(_cell(experiment, column, arm, results) for column in experiment.columns)
    baseline = baseline_of(experiment, arm)
    if baseline is None or arm.solution is None:
        return Row(arm, cells, None)
    criterion = criterion_of(catalogue, experiment.problem, arm)
    failure = reasons.get(arm.slug) or (f"its baseline: {reasons[baseline]}" if baseline in reasons else None)
    verdict = judge(experiment.problem, arm, baseline, criterion, results, failure)
    also = [cost for cost in experiment.costs if (cost.metric, cost.at) != (criterion.metric, criterion.at)]
    costs = "; ".join(filter(None, (_effect_text(experiment, results, arm, cost) for cost in also)))
    other = next((a.label for a in experiment.arms if a.slug == arm.baseline), "")
    return Row(
        arm,
        cells,
        verdict,
        gain=_gain(experiment, arm, criterion, verdict, results, other),
        cost=f"{costs} (against {other})" if costs and other else costs,
    )


def _gain(
    experiment: Experiment,
    arm: Arm,
    criterion: Criterion,
    verdict: Verdict | None,
    results: Results,
    other: str,
) -> str:
    """The effect that the verdict rests on, then what the same metric gains against further arms."""
    if verdict is None:
        return ""
    if verdict.effect is None:
        return verdict.reason
    gains = [e for e in experiment.gains if e.metric == criterion.metric]
    words = next(e for e in gains if e.against is None)
    x = common_x(results, arm.slug, _compared_with(experiment, arm, words), criterion.metric, criterion.at)
    further = (_effect_text(experiment, results, arm, e) for e in gains if e.against is not None)
    return "; ".join(filter(None, (describe_effect(words, verdict.effect, x, other), *further)))


def _compared_with(experiment: Experiment, arm: Arm, effect: Effect) -> str:
    return effect.against or arm.baseline or experiment.arms[0].slug


def _effect_text(experiment: Experiment, results: Results, arm: Arm, effect: Effect) -> str:
    baseline = _compared_with(experiment, arm, effect)
    x = common_x(results, arm.slug, baseline, effect.metric, effect.at)
    if diverged := results.diverged(arm.slug, effect.metric, x):
        return f"{effect.metric} {diverged}"
    interval = measure_effect(results, arm.slug, baseline, effect.metric, effect.compare, x)
    than = next((a.label for a in experiment.arms if a.slug == effect.against), "")
    return "" if interval is None else describe_effect(effect, interval, x, than)


def _cell(experiment: Experiment, column: Column, arm: Arm, results: Results) -> Interval | None:
    """One cell of the table; not a number where a seed diverged, lest the others speak for it."""
    xs = results.xs(arm.slug, column.metric)
    if column.statistic == "exponent":
        return _exponent(column.metric, arm, results, xs)
    compared = arm.baseline or (arm.slug if arm.solution is None else experiment.arms[0].slug)
    x = max(results.xs(compared, column.metric), default=None) if column.at == "last" else column.at
    if results.diverged(arm.slug, column.metric, x):
        return _DIVERGED
    return _estimate(experiment, column.metric, arm, results, x)


def _exponent(metric: str, arm: Arm, results: Results, xs: list[float]) -> Interval | None:
    """Slope over the largest three octaves, where the fixed costs of small inputs no longer count; over the largest
    three sizes where these octaves hold fewer."""
    top = [x for x in xs if x >= xs[-1] / 8 * (1 - 1e-9)]
    top = top if len(top) >= 3 else xs[-3:]
    if any(results.diverged(arm.slug, metric, x) for x in top):
        return _DIVERGED
    samples = [s.reshape(-1) for x in top if (s := results.samples(arm.slug, metric, x)) is not None]
    if len(samples) < 3:
        return None
    repeats = min(len(s) for s in samples)
    slope = fit_exponent(top, [[s[r] for s in samples] for r in range(repeats)])
    return slope if math.isfinite(slope.value) else None
