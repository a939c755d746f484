"""Summaries of runs that went wrong in part: what is shown, and that one arm's trouble is not another's."""

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from transformer_problems.catalogue import load_catalogue
from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.core.summaries import Arm, Chart, Column, ProblemSummary, Row
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.results import Results
from transformer_problems.lab.summary import summarise

HERE = Environment("0.1.0", "code-a", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-31")
LONGEST = 8.0
TIMES = {"dense": 4.0, "other": 2.0, "sparse": 1.0, "sparse_slow": 5.0, "longformer": 1.0, "performer": 1.0}
Record = tuple[Cell, Measurement]


class Toy:
    """Like problem 01, with its catalogue entry and criterion."""

    problem = 1
    arms = (
        Arm("dense", "dense attention"),
        Arm("other", "another baseline"),
        Arm("sparse", "Sparse", "sparse-attention", lead=True),
        Arm("sparse_slow", "Sparse, slow", "sparse-attention"),
        Arm("longformer", "Longformer", "longformer", lead=True),
        Arm("performer", "Performer", "performer", lead=True, baseline="other"),
    )
    chart = Chart("latency_s", "one", "all", "tokens", "seconds", "lower")
    columns = (Column("latency_s", "seconds", at="last"), Column("accuracy", "right"))
    gains = (Effect("latency_s", "ratio", ("less time", "more time"), "last", "at {x:.0f} tokens"),)
    costs = (Effect("accuracy", "difference", ("points less", "points more"), scale=100),)
    shared_examples = frozenset({"accuracy"})

    def finding(self, results: Results) -> str:
        samples = results.samples("dense", "latency_s", LONGEST)
        assert samples is not None
        return f"{samples.mean():.0f} seconds"


def times(arm: str, values: Iterable[float], x: float = LONGEST) -> list[Record]:
    """One value a seed."""
    return [(Cell(1, arm, "quick", s), Measurement("latency_s", "s", v, x, "tokens")) for s, v in enumerate(values)]


def answers(arm: str, values: Iterable[float], seed: int = 0) -> list[Record]:
    return [(Cell(1, arm, "quick", seed), Measurement("accuracy", "1", v, repeat=r)) for r, v in enumerate(values)]


def healthy(*, without: tuple[str, ...] = ()) -> list[Record]:
    """Three seeds of every arm."""
    return [r for arm, t in TIMES.items() if arm not in without for r in times(arm, [t, 1.01 * t, 0.99 * t])]


def summary_of(records: list[Record], failures: dict[Cell, str] | None = None) -> ProblemSummary:
    return summarise(Toy(), load_catalogue(), records, failures or {}, "quick", HERE)


def rows_of(summary: ProblemSummary) -> dict[str, Row]:
    return {row.arm.slug: row for row in summary.rows}


def test_a_diverged_arm_is_called_so_and_blocks_no_other() -> None:
    for lost in (math.nan, math.inf):
        summary = summary_of([*healthy(without=("longformer",)), *times("longformer", [1.0, lost, 1.0])])
        rows = rows_of(summary)
        verdict = rows["longformer"].verdict
        assert verdict is not None
        assert (verdict.word, verdict.reason) == ("diverged", "its latency_s diverged in 1 of 3 seeds")
        assert rows["longformer"].gain == verdict.reason
        assert rows["longformer"].cells[0] is not None
        assert math.isnan(rows["longformer"].cells[0].value)
        line = next(line for line in summary.lines if line.arm.slug == "longformer")
        assert [point.y.value for point in line.points] == [1.0]  # of the finite rest
        others = {slug: row for slug, row in rows_of(summary_of(healthy())).items() if slug != "longformer"}
        assert others.items() <= rows.items()


def test_an_arm_that_diverged_in_every_seed_has_no_line() -> None:
    summary = summary_of([*healthy(without=("sparse",)), *times("sparse", [math.nan] * 3)])
    assert "sparse" not in {line.arm.slug for line in summary.lines}
    assert "diverged in 3 of 3 seeds" in rows_of(summary)["sparse"].gain


def test_a_diverged_baseline_is_told_and_its_seeds_are_left_out() -> None:
    rest = healthy(without=("dense",))
    partly = summary_of([*times("dense", [4.0, math.nan, 4.0]), *rest])
    assert partly.finding == "The baseline, dense attention, diverged in 1 of 3 seeds."
    verdict = rows_of(partly)["sparse"].verdict
    assert verdict is not None
    assert verdict.word == "helps"
    assert verdict.reason.endswith("left out: its baseline diverged in 1 of 3 seeds")
    wholly = rows_of(summary_of([*times("dense", [math.nan] * 3), *rest]))["sparse"].verdict
    assert wholly is not None
    assert (wholly.word, wholly.reason) == ("not runnable here", "its baseline diverged in 3 of 3 seeds")


def test_an_exponent_over_a_diverged_length_is_not_given() -> None:
    toy = Toy()
    toy.columns = (Column("latency_s", "exponent", statistic="exponent"),)
    records = [r for x in (2.0, 4.0, LONGEST) for arm, t in TIMES.items() for r in times(arm, [t * x], x)]
    records += times("sparse", [math.nan], 4.0)
    rows = rows_of(summarise(toy, load_catalogue(), records, {}, "quick", HERE))
    assert rows["longformer"].cells[0] is not None
    assert abs(rows["longformer"].cells[0].value - 1) < 1e-9  # an exact power law in float64
    assert rows["sparse"].cells[0] is not None
    assert math.isnan(rows["sparse"].cells[0].value)


def test_an_arm_without_spread_of_its_own_has_no_interval_and_none_leaves_the_measured_range() -> None:
    records = [
        *healthy(),
        *answers("dense", [0, 1, 0, 1, 0, 1, 0, 1]),
        *answers("sparse", [1] * 8),
        *answers("longformer", [1, 1, 1, 0, 1, 1, 1, 1]),
    ]
    cells = {slug: row.cells[1] for slug, row in rows_of(summary_of(records)).items()}
    sparse, longformer = cells["sparse"], cells["longformer"]
    assert sparse is not None
    assert longformer is not None
    assert (sparse.value, sparse.low, sparse.high) == (1.0, 1.0, 1.0)
    assert 0 <= longformer.low < longformer.value < longformer.high <= 1


def test_a_gain_names_the_baseline_that_is_not_the_experiments_own() -> None:
    records = [*healthy(), *answers("other", [0, 1]), *answers("performer", [1, 1])]
    rows = rows_of(summary_of(records))
    assert rows["longformer"].gain.endswith("less time at 8 tokens")
    assert rows["performer"].gain.endswith("less time at 8 tokens than another baseline")
    assert rows["performer"].cost.endswith("points more (against another baseline)")


def test_gains_and_costs_against_a_further_arm_name_it() -> None:
    toy = Toy()
    toy.gains = (*Toy.gains, Effect("latency_s", "ratio", ("less", "more"), "last", against="other"))
    toy.costs = (Effect("accuracy", "difference", ("points less", "points more"), scale=100, against="other"),)
    records = [*healthy(), *answers("other", [0, 1]), *answers("longformer", [1, 1])]
    rows = rows_of(summarise(toy, load_catalogue(), records, {}, "quick", HERE))
    assert rows["longformer"].gain == "4.0x less time at 8 tokens; 2.0x less than another baseline"
    assert rows["longformer"].cost.endswith("points more than another baseline")
    alone = rows_of(summarise(toy, load_catalogue(), healthy(without=("other",)), {}, "quick", HERE))
    assert alone["longformer"].gain == "4.0x less time at 8 tokens"


def test_what_a_verdict_rests_on_is_not_told_again_as_a_cost() -> None:
    toy = Toy()
    toy.costs = (*Toy.costs, Effect("latency_s", "ratio", ("less time", "more time"), "last"))
    records = [*healthy(), *answers("dense", [0, 1]), *answers("longformer", [1, 1])]
    row = rows_of(summarise(toy, load_catalogue(), records, {}, "quick", HERE))["longformer"]
    assert "less time" in row.gain and "points more" in row.cost
    assert "less time" not in row.cost


class ToyWithNotes(Toy):
    def notes(self, results: Results) -> tuple[str, ...]:
        return (f"measured at {results.scale} scale",)


def test_notes_of_the_experiment_stand_before_failed_cells() -> None:
    failed = {Cell(1, "sparse", "quick", 0): "needs CUDA"}
    summary = summarise(ToyWithNotes(), load_catalogue(), healthy(without=("sparse",)), failed, "quick", HERE)
    assert summary.notes == ("measured at quick scale", "sparse, seed 0: needs CUDA")
    assert summary_of(healthy()).notes == ()
    assert summarise(ToyWithNotes(), load_catalogue(), [], {}, "quick", HERE).notes == ()


def test_what_fewer_seeds_measured_is_told() -> None:
    one_seed = [record for record in healthy() if record[0].seed == 0]
    three_of_accuracy = [r for seed in range(3) for arm in TIMES for r in answers(arm, [0, 1], seed)]
    summary = summary_of([*one_seed, *three_of_accuracy])
    assert summary.num_seeds == 3
    assert summary.fewer_seeds == (("latency_s", 1),)
    (note,) = summary.notes
    assert note.startswith("Measured with 1 of 3 seeds")
    assert '"seconds"' in note
    assert '"right"' not in note
    one_each = summary_of([*one_seed, *(r for r in three_of_accuracy if r[0].seed == 0)])
    assert (one_each.fewer_seeds, one_each.notes) == ((), ())


def test_variants_that_disagree_are_counted_beside_the_leading_arm() -> None:
    rows = rows_of(summary_of(healthy()))
    assert rows["sparse"].gain.endswith("(1 of 2 variants helps)")
    assert "variants" not in rows["sparse_slow"].gain
    assert "variants" not in rows["longformer"].gain
    agreeing = [*healthy(without=("sparse_slow",)), *times("sparse_slow", [1.0, 1.0, 1.0])]
    assert "variants" not in rows_of(summary_of(agreeing))["sparse"].gain


def test_an_arm_that_was_never_tried_is_not_called_unrunnable() -> None:
    failed = {Cell(1, "sparse", "quick", 0): "needs CUDA"}
    rows = rows_of(summary_of(healthy(without=("sparse", "longformer")), failed))
    assert rows["longformer"].verdict is None
    assert rows["longformer"].gain == ""
    assert rows["sparse"].verdict is not None
    assert (rows["sparse"].verdict.word, rows["sparse"].verdict.reason) == ("not runnable here", "needs CUDA")


def test_an_arm_whose_baseline_failed_says_so() -> None:
    rows = rows_of(summary_of(healthy(without=("other",)), {Cell(1, "other", "quick", 0): "timed out"}))
    assert rows["performer"].verdict is not None
    assert rows["performer"].verdict.reason == "its baseline: timed out"


def test_a_failed_seed_of_the_baseline_leaves_the_finding_of_the_others() -> None:
    records = [r for r in healthy() if r[0] != Cell(1, "dense", "quick", 2)]
    assert summary_of(records, {Cell(1, "dense", "quick", 2): "timed out"}).finding == "4 seconds"
    failed = {Cell(1, "dense", "quick", 0): "timed out"}
    assert summary_of(healthy(without=("dense",)), failed).finding == "not measured: timed out"
    assert summary_of([]).finding == "not measured yet"


def test_a_promise_that_is_not_a_number_is_broken() -> None:
    records = [(Cell(1, "sparse", "quick", 0), Measurement("changed", "1", math.nan))]
    assert Results(records).largest("sparse", "changed") == math.inf


def test_a_chart_of_quality_against_cost_puts_each_point_at_its_mean_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "chart", replace(Toy.chart, x_metric="flops"))
    flops = [
        (Cell(1, "dense", "quick", seed), Measurement("flops", "FLOP", value, x, "tokens"))
        for x, values in ((4.0, (10.0, 30.0, 20.0)), (LONGEST, (100.0, 100.0, 130.0)))
        for seed, value in enumerate(values)
    ]
    summary = summary_of([*healthy(), *times("dense", [2.0, 2.0, 2.0], x=4.0), *flops])
    lines = {line.arm.slug: [point.x for point in line.points] for line in summary.lines}
    assert lines["dense"] == [20.0, 110.0]
    assert lines["sparse"] == [math.inf]  # without a cost it has no place, and is not drawn
