"""From measurements to verdicts and words, on cases whose answer is known on paper."""

import dataclasses

import pytest

from transformer_problems.catalogue import load_catalogue
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell, Interval, Measurement
from transformer_problems.core.summaries import Arm
from transformer_problems.lab.effects import Effect, common_x, describe_effect, measure_effect
from transformer_problems.lab.judge import judge, verdict_word
from transformer_problems.lab.results import Results

CRITERION = dataclasses.replace(
    load_catalogue().problem("01").criterion, metric="latency_s", at="last", better="lower", compare="ratio", margin=0.1
)


def record(
    arm: str, value: float, *, metric: str = "latency_s", x: float | None = None, seed: int = 0, repeat: int = 0
):
    return Cell(1, arm, "quick", seed), Measurement(metric, "s", value, x=x, repeat=repeat)


def series(arm: str, values: list[float], x: float = 8.0):
    return [record(arm, value, x=x, repeat=i) for i, value in enumerate(values)]


def test_results_pair_what_both_arms_have() -> None:
    results = Results(
        [*series("dense", [4.0, 4.2, 4.4]), *series("flash", [1.0, 1.1]), *series("flash", [9.0], x=16.0)]
    )
    assert results.xs("flash", "latency_s") == [8.0, 16.0]
    assert common_x(results, "flash", "dense", "latency_s", "last") == 8.0
    treated, baseline = results.paired("flash", "dense", "latency_s", 8.0)
    assert treated.tolist() == [[1.0, 1.1]]
    assert baseline.tolist() == [[4.0, 4.2]]
    assert results.paired("flash", "absent", "latency_s", 8.0) is None


@pytest.mark.parametrize(
    ("interval", "compare", "better", "word"),
    [
        ((0.5, 0.4, 0.6), "ratio", "lower", "helps"),
        ((0.5, 0.4, 0.6), "ratio", "higher", "hurts"),
        ((2.0, 1.5, 2.5), "ratio", "lower", "hurts"),
        ((1.0, 0.95, 1.05), "ratio", "lower", "no effect"),
        ((0.9, 0.7, 1.1), "ratio", "lower", "inconclusive"),
        ((0.3, 0.2, 0.4), "difference", "higher", "helps"),
        ((0.05, -0.05, 0.09), "difference", "higher", "no effect"),
        ((0.1, 0.0, 0.2), "difference", "higher", "inconclusive"),
    ],
)
def test_the_word_follows_the_whole_interval(interval, compare, better, word) -> None:
    criterion = dataclasses.replace(CRITERION, compare=compare, better=better, margin=0.1)
    assert verdict_word(Interval(*interval), criterion) == word


def test_results_know_their_scale_and_what_fewer_seeds_measured() -> None:
    results = Results([record("dense", 1.0, seed=s, metric="bits") for s in (0, 1)] + [record("dense", 2.0, x=4.0)])
    assert results.scale == "quick"
    assert results.with_fewer_seeds(("latency_s", "bits", "absent")) == {"latency_s": 1}


def test_a_clear_ratio_helps() -> None:
    results = Results([*series("dense", [4.0, 4.4, 4.2]), *series("flash", [1.0, 1.1, 1.05])])
    verdict = judge(1, Arm("flash", "Flash"), "dense", CRITERION, results, None)
    assert verdict.word == "helps"
    assert verdict.effect is not None
    assert verdict.effect.value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("compare", "nothing"),
    [("ratio", "a ratio between 0.909 and 1.1"), ("difference", "a difference between -0.1 and 0.1")],
)
def test_the_reason_tells_the_effect_and_what_counts_as_none(compare, nothing) -> None:
    seeds = [record(arm, v, x=8.0, seed=s) for arm, v in (("dense", 4.0), ("flash", 1.0)) for s in (0, 1)]
    criterion = dataclasses.replace(CRITERION, compare=compare)
    effect = "0.25, 95% interval 0.25 to 0.25" if compare == "ratio" else "-3, 95% interval -3 to -3"
    reason = judge(1, Arm("flash", "Flash"), "dense", criterion, Results(seeds), None).reason
    assert reason == f"latency_s {compare} {effect}; {nothing} counts as no effect"


@pytest.mark.parametrize(
    ("num_repeats", "spread"), [(1, "one value"), (2, "95% interval 0.25 to 0.25 over 2 repeats with one seed")]
)
def test_the_reason_tells_what_an_interval_of_one_seed_holds(num_repeats: int, spread: str) -> None:
    results = Results([*series("dense", [4.0] * num_repeats), *series("flash", [1.0] * num_repeats)])
    reason = judge(1, Arm("flash", "Flash"), "dense", CRITERION, results, None).reason
    assert reason.startswith(f"latency_s ratio 0.25, {spread}; ")


def test_a_quality_of_one_value_has_no_interval() -> None:
    criterion = dataclasses.replace(CRITERION, quality="accuracy", quality_loss=0.02)
    accuracy = [record(arm, value, metric="accuracy") for arm, value in (("dense", 0.9), ("flash", 0.8))]
    results = Results([*series("dense", [4.0, 4.2]), *series("flash", [1.0, 1.1]), *accuracy])
    reason = judge(1, Arm("flash", "Flash"), "dense", criterion, results, None).reason
    assert "accuracy lost 0.1, one value, of which 0.02 is allowed" in reason


@pytest.mark.parametrize(("changed", "word"), [(None, "helps"), (0.0, "helps"), (0.01, "hurts")])
def test_a_broken_promise_hurts_whatever_it_gains(changed: float | None, word: str) -> None:
    records = [*series("dense", [4.0, 4.4, 4.2]), *series("flash", [1.0, 1.1, 1.05])]
    if changed is not None:
        records += [record("flash", value, metric="changed", repeat=i) for i, value in enumerate([0.0, changed])]
    criterion = dataclasses.replace(CRITERION, promise="changed", promise_limit=0.005)
    assert judge(1, Arm("flash", "Flash"), "dense", criterion, Results(records), None).word == word


def test_nothing_measured_is_said_with_its_reason() -> None:
    verdict = judge(1, Arm("flash", "Flash"), "dense", CRITERION, Results(series("dense", [1.0])), "needs CUDA")
    assert (verdict.word, verdict.reason, verdict.effect) == ("not runnable here", "needs CUDA", None)


def test_words_for_ratios_and_differences() -> None:
    less_time = Effect("latency_s", "ratio", ("less time", "more time"), "last", "at {x:,.0f} tokens")
    text = describe_effect(less_time, Interval(0.025, 0.02, 0.03125), 8192.0)
    assert text == "40x (32 to 50) less time at 8,192 tokens"
    assert describe_effect(less_time, Interval(1.5, 1.5, 1.5), 8.0) == "1.5x more time at 8 tokens"
    points = Effect("accuracy", "difference", ("points less", "points more"), scale=100)
    assert describe_effect(points, Interval(0.48, 0.455, 0.5), None) == "48 (46 to 50) points more"
    assert describe_effect(points, Interval(-0.02, -0.05, 0.012), None) == "2.0 (-1.2 to 5.0) points less"


def test_words_that_hide_the_direction_are_refused() -> None:
    with pytest.raises(ArgumentError, match="words must differ"):
        Effect("step_s", "ratio", ("time a step", "time a step"))


@pytest.mark.parametrize(
    ("compare", "words", "interval", "text"),
    [
        ("ratio", ("less time a step", "more time a step"), (1.003, 0.9961, 1.04), "no change in time a step at 2x"),
        ("ratio", ("less time", "more time"), (0.48, 0.4, 0.5), "2.1x (2.0 to 2.5) less time at 2x"),
        ("ratio", ("less time", "more time"), (1.03, 0.99, 1.06), "1.03x (0.99 to 1.06) more time at 2x"),
        ("difference", ("points less recall", "points more recall"), (0.0, 0.0, 0.0), "no change in recall at 2x"),
        ("difference", ("less", "more"), (-0.001, -0.002, 0.004), "no change at 2x"),
        ("difference", ("less", "more"), (0.001, -0.002, 0.02), "0.00 (0.00 to 0.02) more at 2x"),
    ],
)
def test_what_did_not_change_is_said_in_words(compare, words, interval, text) -> None:
    assert describe_effect(Effect("m", compare, words, where="at {x:.0f}x"), Interval(*interval), 2.0) == text


def test_effects_are_paired_by_seed_and_repeat() -> None:
    rows = [
        record(arm, base + shift, seed=seed, repeat=repeat)
        for arm, shift in (("a", 0.0), ("b", 0.5))
        for seed, base in enumerate((1.0, 5.0, 9.0))
        for repeat in range(4)
    ]
    effect = measure_effect(Results(rows), "b", "a", "latency_s", "difference", None)
    assert effect == Interval(0.5, 0.5, 0.5)


def test_eased_samples_leave_out_what_every_arm_finds_hard() -> None:
    """Examples of hardness 1, 5 and 9; arm b is 0.5 above arm a on each."""
    rows = [
        record(arm, hardness + shift, repeat=repeat)
        for arm, shift in (("a", 0.0), ("b", 0.5))
        for repeat, hardness in enumerate((1.0, 5.0, 9.0))
    ]
    results = Results(rows)
    assert results.samples("b", "latency_s").tolist() == [[1.5, 5.5, 9.5]]
    assert results.eased("a", "latency_s") == pytest.approx(5.0)
    assert results.eased("b", "latency_s") == pytest.approx(5.5)
    assert results.eased("absent", "latency_s") is None


@pytest.mark.parametrize(
    ("accuracies", "word"),
    [
        ([0.90, 0.91, 0.90, 0.91], "helps"),  # as good
        ([0.80, 0.81, 0.80, 0.81], "hurts"),  # a tenth lost for sure
        ([0.80, 0.98, 0.82, 0.99], "inconclusive"),  # as good on average, with room for a loss
    ],
)
def test_a_gain_is_held_to_its_quality(accuracies: list[float], word: str) -> None:
    criterion = dataclasses.replace(CRITERION, quality="accuracy", quality_loss=0.02)
    baseline = [record("dense", 0.90 + 0.01 * (i % 2), metric="accuracy", repeat=i) for i in range(4)]
    treated = [record("flash", value, metric="accuracy", repeat=i) for i, value in enumerate(accuracies)]
    results = Results([*series("dense", [4.0, 4.2]), *series("flash", [1.0, 1.1]), *baseline, *treated])
    verdict = judge(1, Arm("flash", "Flash"), "dense", criterion, results, None)
    assert verdict.word == word
    assert "accuracy lost" in verdict.reason


def test_a_quality_measured_along_something_is_held_where_the_gain_is_read() -> None:
    criterion = dataclasses.replace(CRITERION, at="last", quality="bits", quality_better="lower", quality_loss=0.05)
    for last, word in ((3.0, "helps"), (3.2, "hurts")):
        bits = [
            record(arm, value, metric="bits", x=x)
            for arm, values in (("dense", (4.0, 3.0)), ("flash", (5.0, last)))
            for x, value in zip((1.0, 2.0), values, strict=True)
        ]
        seconds = [record(arm, s, x=x) for arm, s in (("dense", 4.0), ("flash", 1.0)) for x in (1.0, 2.0)]
        verdict = judge(1, Arm("flash", "Flash"), "dense", criterion, Results([*seconds, *bits]), None)
        assert verdict.word == word
        assert "bits lost" in verdict.reason


def test_a_lower_loss_is_no_loss_of_quality() -> None:
    criterion = dataclasses.replace(CRITERION, quality="bits", quality_better="lower", quality_loss=0.05)
    bits = [record("dense", 3.0, metric="bits"), record("flash", 2.0, metric="bits")]
    results = Results([*series("dense", [4.0, 4.2]), *series("flash", [1.0, 1.1]), *bits])
    assert judge(1, Arm("flash", "Flash"), "dense", criterion, results, None).word == "helps"


def test_a_training_that_stopped_at_numbers_that_are_not_finite_diverged() -> None:
    results = Results(series("dense", [4.0, 4.2]))
    failure = "DivergedError: the loss is nan at step 3."
    verdict = judge(1, Arm("flash", "Flash"), "dense", CRITERION, results, failure)
    assert (verdict.word, verdict.reason) == ("diverged", failure)


def test_a_ratio_of_nearly_nothing_is_told_without_its_digits() -> None:
    effect = Effect("distance", "ratio", ("less distance", "more distance"))
    assert describe_effect(effect, Interval(4.4e6, 3.0e6, 5.7e6), None) == "over 10,000x more distance"
