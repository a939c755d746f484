"""From measurements to what a page shows: curves, table, verdicts and the words for them."""

import math
from collections.abc import Mapping, Sequence

from transformer_problems.catalogue import Catalogue, Criterion
from transformer_problems.core.records import Cell, Environment, Interval, Measurement, Scale, Verdict
from transformer_problems.core.summaries import Arm, Column, Line, Point, ProblemSummary, Row
from transformer_problems.lab.effects import Effect, common_x, describe_effect, measure_effect
from transformer_problems.lab.experiment import Experiment
from transformer_problems.lab.judge import judge
from transformer_problems.lab.results import Results
from transformer_problems.lab.statistics import fit_exponent, mean_interval


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
    baseline = experiment.arms[0]
    rows = tuple(_row(experiment, catalogue, arm, results, reasons.get(arm.slug)) for arm in experiment.arms)
    lines = tuple(line for arm in experiment.arms if (line := _line(experiment, arm, results)).points)
    finding = experiment.finding(results) if baseline.slug not in reasons else f"not measured: {reasons[baseline.slug]}"
    notes = tuple(f"{cell.arm}, seed {cell.seed}: {reason}" for cell, reason in failures.items())
    return ProblemSummary(
        number=experiment.problem,
        finding=finding,
        chart=experiment.chart,
        lines=lines,
        columns=experiment.columns,
        rows=rows,
        scale=scale,
        num_seeds=len(results.seeds),
        environment=environment,
        notes=notes,
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


def _line(experiment: Experiment, arm: Arm, results: Results) -> Line:
    metric = experiment.chart.metric
    estimates = {x: _estimate(experiment, metric, arm, results, x) for x in results.xs(arm.slug, metric)}
    return Line(arm, tuple(Point(x, estimate) for x, estimate in estimates.items() if estimate))


def _estimate(experiment: Experiment, metric: str, arm: Arm, results: Results, x: float | None) -> Interval | None:
    """Mean and interval; on shared examples without the spread between easy and hard ones, which all arms have."""
    read = results.eased if metric in experiment.shared_examples else results.samples
    samples = read(arm.slug, metric, x)
    return None if samples is None else mean_interval(samples)


def _row(experiment: Experiment, catalogue: Catalogue, arm: Arm, results: Results, failure: str | None) -> Row:
    cells = tuple(_cell(experiment, column, arm, results) for column in experiment.columns)
    baseline = baseline_of(experiment, arm)
    if baseline is None or arm.solution is None:
        return Row(arm, cells, None)
    criterion = criterion_of(catalogue, experiment.problem, arm)
    verdict = judge(experiment.problem, arm, baseline, criterion, results, failure)
    return Row(
        arm,
        cells,
        verdict,
        gain=_gain(experiment, arm, baseline, criterion, verdict, results),
        cost="; ".join(filter(None, (_effect_text(results, arm, baseline, cost) for cost in experiment.costs))),
    )


def _gain(
    experiment: Experiment, arm: Arm, baseline: str, criterion: Criterion, verdict: Verdict, results: Results
) -> str:
    if verdict.effect is None:
        return verdict.reason
    words = next(e for e in experiment.gains if e.metric == criterion.metric)
    x = common_x(results, arm.slug, baseline, criterion.metric, criterion.at)
    return describe_effect(words, verdict.effect, x)


def _effect_text(results: Results, arm: Arm, baseline: str, effect: Effect) -> str:
    x = common_x(results, arm.slug, baseline, effect.metric, effect.at)
    interval = measure_effect(results, arm.slug, baseline, effect.metric, effect.compare, x)
    return "" if interval is None else describe_effect(effect, interval, x)


def _cell(experiment: Experiment, column: Column, arm: Arm, results: Results) -> Interval | None:
    xs = results.xs(arm.slug, column.metric)
    if column.statistic == "exponent":
        return _exponent(column.metric, arm, results, xs)
    x = max(results.xs(experiment.arms[0].slug, column.metric), default=None) if column.at == "last" else column.at
    return _estimate(experiment, column.metric, arm, results, x)


def _exponent(metric: str, arm: Arm, results: Results, xs: list[float]) -> Interval | None:
    """Slope over the largest three octaves, where the fixed costs of small inputs no longer count."""
    top = [x for x in xs if x >= xs[-1] / 8 * (1 - 1e-9)]
    samples = [s.reshape(-1) for x in top if (s := results.samples(arm.slug, metric, x)) is not None]
    if len(samples) < 3:
        return None
    repeats = min(len(s) for s in samples)
    slope = fit_exponent(top, [[s[r] for s in samples] for r in range(repeats)])
    return slope if math.isfinite(slope.value) else None
