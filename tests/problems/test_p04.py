"""Problem 4: every arm measures what the page shows, caches cost what they should, promises are checked."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN, masked_bits_per_byte
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.problems.p04_slow_decoding import experiment as p04
from transformer_problems.problems.p04_slow_decoding import small_models
from transformer_problems.solutions.decoding.speculative import predicted_speedup

EXPERIMENT = p04.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
TINY = p04._Size(16, 2, 2, small_models.Budget(steps=2, batch_size=2, num_texts=2), seeds=1)
FIRST, LAST = float(p04._HISTORIES[0]), float(p04._HISTORIES[-1])
SPECULATIVE = {"speculative", "prompt_lookup"}
OF_SOME_ARMS = {
    "tokens_changed": p04._SAME_OUTPUT,
    "acceptance": SPECULATIVE,
    "predicted_speedup": SPECULATIVE,
}


def _tiny(name: str, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LlamaDecoder:
    """A model whose random weights are large enough that no two tokens are nearly as probable."""
    config = LlamaConfig(257, 16, num_layers=2 if name == "base" else 1, num_heads=2, feed_forward_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = LlamaDecoder(config, dtype=dtype, device=device)
    for parameter in model.parameters():
        parameter.data.mul_(10)
    return model.eval()


@pytest.fixture
def base() -> LlamaDecoder:
    return _tiny("base")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p04._SIZES, "quick", TINY)
        patch.setattr(small_models, "load_bundled", _tiny)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(4, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _by_x(measurements: list[Measurement], metric: str) -> dict[float | None, float]:
    return {m.x: m.value for m in measurements if m.metric == metric}


def _values(measurements: list[Measurement], metric: str) -> list[float]:
    return [m.value for m in measurements if m.metric == metric]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, float(history)) for history in p04._HISTORIES}
    needed = {(m, LAST if at == "last" else at) for m, at in shown if arm in OF_SOME_ARMS.get(m, ARMS)}
    assert needed <= found
    assert all(value > 0 for value in _values(measured[arm], "tokens_per_s"))


def test_a_cached_token_costs_one_pass_and_its_attention(measured: dict[str, list[Measurement]]) -> None:
    flops = _by_x(measured["kv_cache"], "flops_per_token")
    config = _tiny("base").config
    # In each layer each further key is one product with the query and one with the weights, 2 FLOPs a number.
    assert flops[LAST] - flops[FIRST] == (LAST - FIRST) * config.num_layers * 2 * 2 * config.embed_dim
    assert set(_values(measured["kv_cache"], "passes_per_token")) == {1.0}
    held = _by_x(measured["kv_cache"], "cache_bytes")
    assert held[LAST] == (LAST + TINY.num_written) * config.num_layers * 2 * config.embed_dim * 4


def test_recomputing_costs_the_whole_text_again(measured: dict[str, list[Measurement]]) -> None:
    flops = _by_x(measured["recompute"], "flops_per_token")
    assert flops[LAST] > (LAST / (FIRST + TINY.num_written)) * flops[FIRST]
    assert set(_values(measured["recompute"], "cache_bytes")) == {0}


@pytest.mark.parametrize("arm", sorted(p04._SAME_OUTPUT))
def test_promised_text_is_the_models_own(measured: dict[str, list[Measurement]], arm: str) -> None:
    assert set(_values(measured[arm], "tokens_changed")) == {0.0}


def test_a_broken_promise_is_seen(base: LlamaDecoder) -> None:
    tokens = p04.write(p04.Method(base), torch.tensor([[72, 101, 108, 108]]), 8).tokens
    assert p04.share_changed(base, tokens, 8) == 0.0
    tokens[0, -1] = (tokens[0, -1] + 1) % 256
    assert p04.share_changed(base, tokens, 8) == 1 / 8


def test_ways_of_one_model_predict_alike(measured: dict[str, list[Measurement]]) -> None:
    bits = [_values(measured[arm], "bits_per_byte") for arm in sorted(p04._SAME_OUTPUT)]
    assert all(other == bits[0] for other in bits)


def test_lessons_differ_in_their_outcome_alone(measured: dict[str, list[Measurement]]) -> None:
    students = [measured[arm] for arm in ("small", "distilled", "distilled_sequences")]
    assert len({tuple(_values(student, "bits_per_byte")) for student in students}) == 3
    assert len({tuple(_values(student, "flops_per_token")) for student in students}) == 1


def test_a_perfect_draft_is_always_accepted(base: LlamaDecoder) -> None:
    written = p04.write(p04.Method(base, draft=base), torch.tensor([[72, 101, 108, 108]]), 16)
    assert written.speculation is not None
    assert written.speculation.acceptance_rate == 1.0
    assert (written.num_tokens, written.num_passes) == (15, 3)  # 5 tokens a pass, the first came with the prompt


@pytest.mark.parametrize("arm", sorted(SPECULATIVE))
def test_the_prediction_follows_from_what_was_measured(measured: dict[str, list[Measurement]], arm: str) -> None:
    acceptance, cost, predicted = (
        _by_x(measured[arm], metric)[LAST] for metric in ("acceptance", "cost_ratio", "predicted_speedup")
    )
    assert predicted == predicted_speedup(acceptance, p04.DRAFTED, cost)


@pytest.mark.parametrize("use_cache", [True, False])
def test_reading_the_prompt_is_taken_off(base: LlamaDecoder, use_cache: bool) -> None:
    prompt = torch.tensor([[72, 101, 108, 108]])
    written = p04.write(p04.Method(base, use_cache=use_cache), prompt, 8)
    assert (written.num_tokens, written.num_passes) == (7, 7)
    assert [(model, tokens.tolist()) for model, tokens in written.read] == [(base, prompt.tolist())]
    assert written.seconds > 0


@pytest.mark.parametrize(("arm", "num_passes"), p04._PASSES.items())
def test_mask_predict_takes_its_passes(measured: dict[str, list[Measurement]], arm: str, num_passes: int) -> None:
    assert set(_values(measured[arm], "passes_per_token")) == {num_passes / TINY.num_written}


class _Uniform(nn.Module):
    """Predicts every token alike, and notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens)
        return torch.zeros(*tokens.shape, 257)


def test_rounds_hide_what_is_still_to_come() -> None:
    model, windows = _Uniform(), torch.arange(40).reshape(2, 20)
    bits = p04.continuation_bits(p04.Method(model, num_passes=4), windows, 8, torch.Generator().manual_seed(0))
    assert bits.tolist() == pytest.approx([math.log2(257)] * 2, rel=1e-6)  # float32 rounds at 6e-8, summed 8 times
    assert [(shown == MASK_TOKEN).sum(dim=1).tolist() for shown in model.shown] == [[8, 8], [6, 6], [4, 4], [2, 2]]
    assert all(torch.equal(shown[:, :12], windows[:, :12]) for shown in model.shown)


def test_one_round_predicts_all_at_once(base: LlamaDecoder) -> None:
    windows = torch.arange(40).reshape(2, 20)
    bits = p04.continuation_bits(p04.Method(base, num_passes=1), windows, 8, torch.Generator().manual_seed(0))
    hidden = (torch.arange(20) >= 12).expand(2, 20)
    with torch.no_grad():
        expected = masked_bits_per_byte(base(windows.masked_fill(hidden, MASK_TOKEN)), windows, hidden)
    torch.testing.assert_close(bits, expected, rtol=1e-6, atol=0.0)


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(4, "recompute", "quick", 0), m) for m in measured["recompute"]]
    finding = EXPERIMENT.finding(Results(records))
    assert "After 28 tokens" in finding
    assert "after 224" in finding


@pytest.mark.parametrize(
    ("soft", "texts", "words"), [(2.5, 1.5, ("worse", "better")), (2.0, 2.0, ("no different",) * 2)]
)
def test_the_finding_tells_what_teachers_add_to_the_small_model(
    measured: dict[str, list[Measurement]], soft: float, texts: float, words: tuple[str, str]
) -> None:
    measurements = {arm: [Measurement("bits_per_byte", "bit", 1.0, LAST)] for arm in ("kv_cache", *p04._LESSONS)}
    for arm, bits in (("small", 2.0), ("distilled", soft), ("distilled_sequences", texts)):
        measurements[arm] = [Measurement("bits_per_byte", "bit", bits, LAST)]
    for arm, speed in (("kv_cache", 100.0), ("small", 400.0)):
        measurements[arm].append(Measurement("tokens_per_s", "tokens/s", speed, LAST))
    measurements["recompute"] = measured["recompute"]
    finding = EXPERIMENT.finding(
        Results([(Cell(4, arm, "quick", 0), m) for arm, ms in measurements.items() for m in ms])
    )
    assert "4.0 times as fast as the large one" in finding
    assert "labels bring it to 2.00 bits per byte" in finding
    assert f"soft targets to {soft:.2f} ({words[0]})" in finding
    assert f"texts that the teacher wrote to {texts:.2f} ({words[1]})" in finding


def test_distilled_models_are_compared_with_the_same_model_without_a_teacher() -> None:
    baselines = {arm.baseline for arm in EXPERIMENT.arms if arm.solution == "distillation"}
    assert baselines == {"small"}


def test_notes_tell_budget_and_lines_to_compare_with() -> None:
    records = [
        (Cell(4, arm, "standard", 0), Measurement("bits_per_byte", "bit", value, LAST))
        for arm, value in (("mask_predict", 4.5), ("mask_predict_1", 4.7))
    ]
    lines, budget, gain = EXPERIMENT.notes(Results(records))
    assert "4.68" in lines
    assert "Mask-Predict has 4.70 with 1, 4.50 with 4 passes." in lines
    assert f"{p04._SIZES['standard'].budget.steps} steps of" in budget
    assert "predicted gain" in gain
    without = EXPERIMENT.notes(Results([(Cell(4, "kv_cache", "quick", 0), records[0][1])]))
    assert "Mask-Predict has" not in without[0]
    assert f"{p04._SIZES['quick'].budget.steps} steps of" in without[1]
