"""Problem 7: bills add up, predictions hold, exact methods stay exact, and smaller caches are smaller."""

from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p07_high_memory_footprint import experiment as p07
from transformer_problems.problems.p07_high_memory_footprint.bill import Bill, longest_fit, measurements_of
from transformer_problems.problems.p07_high_memory_footprint.decoding import CachePlan, decoding_bill
from transformer_problems.problems.p07_high_memory_footprint.training_step import TRAINING, training_bill

EXPERIMENT = p07.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
CACHES = [arm for arm in ARMS if arm not in TRAINING]
PLAN = CachePlan(32, 4, steps=1, batch_size=2, text_len=128, num_windows=2)
TINY = p07._Size((64, 128, 256), (256, 512, 1024), 4 * 2**20, 2**20, 1, PLAN, seeds=1)
TRAINED_ANEW = {"kv_gqa", "kv_mqa"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p07._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(7, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _values(measurements: list[Measurement], metric: str) -> list[float]:
    return [m.value for m in measurements if m.metric == metric]


def _peaks(measurements: list[Measurement]) -> dict[float | None, float]:
    return {m.x: m.value for m in measurements if m.metric == "peak_memory_bytes"}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {m.metric for m in measured[arm]}
    shown = {column.metric for column in EXPERIMENT.columns}
    shown |= {effect.metric for effect in (*EXPERIMENT.gains, *EXPERIMENT.costs)} | {EXPERIMENT.chart.metric}
    of_training = {"gradient_bytes", "optimizer_bytes", "activation_ratio", "step_s", "gradient_difference"}
    of_decoding = {"cache_bytes", "token_s", "bits_per_byte", "bundled_bits_per_byte"}
    if arm in TRAINED_ANEW:
        shown -= {"bundled_bits_per_byte"}
    assert shown - (of_decoding if arm in TRAINING else of_training) <= found


@pytest.mark.parametrize("arm", ARMS)
def test_the_parts_add_up_to_the_peak(measured: dict[str, list[Measurement]], arm: str) -> None:
    parts = ("weight", "gradient", "optimizer", "cache", "activation")
    total = sum(sum(_values(measured[arm], f"{part}_bytes")) for part in parts)
    longest = max(TINY.lengths if arm in TRAINING else TINY.texts)
    assert total == _peaks(measured[arm])[longest] == _values(measured[arm], "longest_peak_bytes")[0]
    assert all(value > 0 for part in parts for value in _values(measured[arm], f"{part}_bytes"))


def _check(bill: Bill, parts: set[str]) -> None:
    ratios = bill.ratios()
    assert set(ratios) == parts
    for part, ratio in ratios.items():
        within = 0.15 if part == "activation" else 0.05
        assert 1 - within < ratio < 1 + within, part


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("arm", TRAINING)
def test_training_takes_what_is_predicted(arm: str, length: int) -> None:
    """At the sizes that the quick scale measures."""
    bill = training_bill(arm, 64, 8, length, load_text(), torch.device("cpu"))
    _check(bill, {"weight", "gradient", "optimizer", "activation"})


@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("arm", CACHES)
def test_weights_and_caches_take_what_is_predicted(arm: str, length: int) -> None:
    bill = decoding_bill(arm, PLAN, length, load_text(), torch.device("cpu"))
    _check(bill, {"weight", "cache"})


@pytest.mark.parametrize("arm", TRAINING)
def test_gradients_are_those_of_the_untreated_model(measured: dict[str, list[Measurement]], arm: str) -> None:
    (difference,) = _values(measured[arm], "gradient_difference")
    # float32 rounds at 6e-8; sums over 256 tokens in another order, through four layers. Recomputing repeats the sums.
    assert difference == 0 if arm in ("dense", "checkpoint_sqrt", "checkpoint_each") else 0 < difference < 1e-5


def test_scores_make_dense_attention_grow_faster(measured: dict[str, list[Measurement]]) -> None:
    growth = {arm: _peaks(measured[arm])[256] / _peaks(measured[arm])[128] for arm in TRAINING}
    assert growth["dense"] > 2.2
    assert all(growth[arm] < 2.1 for arm in ("flash", "flash_tiled", "memory_efficient"))


def test_a_plain_cache_is_at_its_best(measured: dict[str, list[Measurement]]) -> None:
    """Its buffer has no room to spare: beside keys and values there is only what one token needs."""
    (cache,), (rest,) = (_values(measured["kv_plain"], f"{part}_bytes") for part in ("cache", "activation"))
    assert rest < 0.05 * cache


def test_smaller_caches_are_smaller(measured: dict[str, list[Measurement]]) -> None:
    cache = {arm: _values(measured[arm], "cache_bytes")[0] for arm in CACHES}
    plain = cache["kv_plain"]
    assert plain == cache["kv_paged"] == 2 * cache["kv_gqa"] == 4 * cache["kv_mqa"]
    assert cache["kv_int4"] < cache["kv_int8"] < plain / 2
    peaks = _peaks(measured["kv_sinks"])
    assert peaks[256] == peaks[512] == peaks[1024]


@pytest.mark.parametrize("metric", ["bits_per_byte", "bundled_bits_per_byte"])
def test_pages_lose_nothing_and_rounding_little(measured: dict[str, list[Measurement]], metric: str) -> None:
    plain = _values(measured["kv_plain"], metric)
    assert _values(measured["kv_paged"], metric) == pytest.approx(plain, rel=1e-5)  # float32 sums of other shapes
    # steps of a 255th of a range move a logit of order ten by a few hundredths at most
    assert _values(measured["kv_int8"], metric) == pytest.approx(plain, abs=0.02)
    assert _values(measured["kv_int8"], metric) != plain


def test_the_longest_fit_lies_on_the_line_between_lengths() -> None:
    peaks = {100: 1000, 200: 2000, 400: 8000}
    assert longest_fit(peaks, 1500) == pytest.approx(150)  # bytes ~ tokens
    assert longest_fit(peaks, 4000) == pytest.approx(200 * 2**0.5)  # bytes ~ tokens squared
    assert longest_fit(peaks, 9000) == 400
    assert longest_fit(peaks, 999) is None


def test_the_worst_prediction_at_any_length_is_told() -> None:
    bills = {
        1: Bill({"weight": 100, "cache": 100, "activation": 100}, {"weight": 100, "cache": 80, "activation": 110}),
        2: Bill({"weight": 100, "cache": 200, "activation": 100}, {"weight": 100, "cache": 210, "activation": 90}),
    }
    told = {m.metric: m.value for m in measurements_of(bills, 350)}
    assert told["state_ratio"] == 0.8
    assert told["activation_ratio"] == 0.9
    assert told["cache_bytes"] == 200
    assert told["longest_peak_bytes"] == 400


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(7, arm, "quick", 0), m) for arm in ("dense", "kv_plain") for m in measured[arm]]
    finding = EXPERIMENT.finding(Results(records))
    assert "A training step on 256 tokens" in finding
    assert "4 MiB hold a step on" in finding
    assert "Decoding a text of 1,024 tokens" in finding
    without_decoding = EXPERIMENT.finding(Results(records[: len(measured["dense"])]))
    assert finding.startswith(without_decoding)


@pytest.mark.parametrize(("sqrt", "each", "word"), [(3, 2, "loses"), (2, 3, "wins")])
def test_the_finding_tells_which_checkpoints_save_more(
    measured: dict[str, list[Measurement]], sqrt: int, each: int, word: str
) -> None:
    records = [(Cell(7, "dense", "quick", 0), m) for m in measured["dense"]]
    for arm, peak in (("checkpoint_sqrt", sqrt), ("checkpoint_each", each)):
        records.append((Cell(7, arm, "quick", 0), Measurement("longest_peak_bytes", "bytes", peak * 2**20)))
    finding = EXPERIMENT.finding(Results(records))
    assert f"to {sqrt} MiB, checkpoints at every layer to {each}: sqrt(L) {word} here." in finding


def test_notes_tell_the_schedule_and_the_budget() -> None:
    loss = Measurement("bits_per_byte", "bit", 3.46)
    schedule, budget = EXPERIMENT.notes(Results([(Cell(7, "kv_plain", "standard", 0), loss)]))
    assert "best case" in schedule
    plan = p07._SIZES["standard"].plan
    assert f"{plan.steps} steps of {plan.batch_size} windows of {plan.text_len} bytes, which end at 3.46" in budget
    assert "which end" not in EXPERIMENT.notes(Results([(Cell(7, "dense", "standard", 0), loss)]))[1]
