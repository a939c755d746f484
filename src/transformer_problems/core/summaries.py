"""What a run amounts to, ready to be drawn: the lab fills these in, the report only reads them."""

from dataclasses import dataclass
from typing import Literal

from transformer_problems.core.records import Environment, Interval, Scale, Verdict


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant of an experiment: the untreated model, a solution, or a variant of one.

    Args:
        slug: Unique within its problem, e.g. "rope_yarn".
        label: As drawn at the end of its line, e.g. "RoPE + YaRN".
        solution: Slug of the catalogue pair it stands for; None for the baseline and for controls.
        lead: Its verdict is the pair's verdict; exactly one arm of each pair leads, chosen before the run.
        baseline: Slug of the arm it is compared with; None for the experiment's first arm.
    """

    slug: str
    label: str
    solution: str | None = None
    lead: bool = False
    baseline: str | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """The one chart of a problem, drawn twice: the baseline alone, then with every solution.

    Args:
        metric: Metric on the y axis.
        problem_title: What the left panel shows, e.g. "Time of one attention layer".
        solutions_title: What the right panel shows.
        better: Which way is good.
        x_log: Logarithmic in x, which is above 0.
        x_log_rest: Logarithmic in 1 - x, for shares whose last few hundredths decide; x is below 1.
        y_from: Where a linear y axis begins at the latest, such as at 0; None begins where the lines do.
        draws: Slugs of the arms that get a line on the right (crowded charts leave variants to the table);
            empty draws all.
        x_metric: A metric measured at the same x as `metric`, whose mean takes the place of x: what each size costs
            against what it gives. Empty draws x itself.
    """

    metric: str
    problem_title: str
    solutions_title: str
    x_label: str
    y_label: str
    better: Literal["lower", "higher"]
    x_log: bool = False
    x_log_rest: bool = False
    y_log: bool = False
    y_from: float | None = None
    draws: tuple[str, ...] = ()
    x_metric: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the measured table: a metric, at one x or without.

    Args:
        label: Heading with unit, e.g. "bits/byte at 16x".
        at: The x it is read at; "last" is the largest x that the arm's baseline, or a control itself, was measured at.
        digits: Significant digits printed.
        statistic: "mean" of the samples, or the "exponent" p of metric ~ x^p over the largest three octaves of x.
    """

    metric: str
    label: str
    at: float | Literal["last"] | None = None
    better: Literal["lower", "higher"] | None = None
    digits: int = 3
    statistic: Literal["mean", "exponent"] = "mean"


@dataclass(frozen=True, slots=True)
class Point:
    """Mean and 95% interval of the chart's metric at one x."""

    x: float
    y: Interval


@dataclass(frozen=True, slots=True)
class Line:
    """One arm's curve in the chart."""

    arm: Arm
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One arm in the measured table.

    Args:
        cells: One a column; None where the arm could not be measured there.
        gain: The effect in words, e.g. "41x less time at 8,192 tokens"; empty for baselines.
        cost: What it costs, in words and figures, e.g. "+0.12 bits/byte after equal steps".
        not_asked: Why the arm was not to be measured, e.g. "for images only"; empty where it was.
    """

    arm: Arm
    cells: tuple[Interval | None, ...]
    verdict: Verdict | None
    gain: str = ""
    cost: str = ""
    not_asked: str = ""


@dataclass(frozen=True, slots=True)
class ProblemSummary:
    """Everything a picture or page of one problem shows."""

    number: int
    finding: str  # what the baseline showed, with its figures, and what a verdict alone would hide
    chart: Chart
    lines: tuple[Line, ...]  # the baseline first
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]  # the baseline first
    scale: Scale
    num_seeds: int
    environment: Environment
    notes: tuple[str, ...] = ()  # caveats of the method, figures of fewer seeds, failed cells
    fewer_seeds: tuple[tuple[str, int], ...] = ()  # metrics drawn or judged that fewer seeds were measured by: how many
