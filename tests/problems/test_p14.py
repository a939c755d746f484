"""Problem 14: every arm measures what is shown, attention on noise is read exactly, skipped noise costs nothing."""

from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.needles import Needles, plant_needles
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p14_noise_sensitivity import experiment as p14
from transformer_problems.solutions.tokens.pruning import TokenPruning

EXPERIMENT = p14.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
TINY = p14._Size(16, 2, steps=3, batch_size=4, num_examples=8, num_timed=4, repeats=1, seeds=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p14._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(14, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _flops(measurements: list[Measurement]) -> dict[float | None, float]:
    return {m.x: m.value for m in measurements if m.metric == "flops"}


def _needles(length: int = 40) -> Needles:
    return plant_needles(torch.randint(256, (4, length), generator=generator(0)), generator(1))


def _model(arm: str) -> torch.nn.Module:
    with seeded(0, "model"):
        return p14.build_model(arm, 16, 2).eval()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown.add((EXPERIMENT.chart.metric, 0.5))
    if arm in p14._WITHOUT_MASS:
        shown = {(metric, at) for metric, at in shown if metric != "distractor_mass"}
    assert shown <= found


def test_skipped_noise_is_not_computed(measured: dict[str, list[Measurement]]) -> None:
    dense = _flops(measured["dense"])
    assert dense[0.95] > dense[0.5] > dense[0.0]
    assert _flops(measured["masked"]) == dense  # a mask hides padding and computes it all the same
    for arm in ("packed", "pruning", "merging"):
        assert _flops(measured[arm])[0.95] < 0.8 * dense[0.95]
    assert _flops(measured["packed"])[0.0] == dense[0.0]


def test_packing_answers_as_the_mask_does() -> None:
    model, needles = _model("masked"), _needles()
    with torch.no_grad():
        packed, masked = p14.answer("packed", model, needles), p14.answer("masked", model, needles)
    torch.testing.assert_close(packed, masked)  # float32 defaults


@pytest.mark.parametrize("arm", sorted(set(ARMS) - p14._WITHOUT_MASS))
def test_attention_on_noise_is_a_share(measured: dict[str, list[Measurement]], arm: str) -> None:
    masses = [m for m in measured[arm] if m.metric == "distractor_mass"]
    assert all(-1e-6 <= m.value <= 1 + 1e-6 for m in masses)  # float32 sums of weights that add up to one
    assert all(abs(m.value) < 1e-6 for m in masses if m.x == 0.0)


def test_attention_on_noise_equals_the_dense_sum() -> None:
    """By the definition: softmax of the first layer's scores, and of the second's, summed over noise."""
    model, needles = _model("dense"), _needles()
    assert isinstance(model, Encoder)
    masses = []
    with torch.no_grad():
        x = model.body.embed(needles.tokens, torch.arange(needles.tokens.shape[1]))
        for block in model.body.blocks:
            mixer = block.mixer
            h = block.mixer_residual.norm(x)
            q, k = (proj(h).unflatten(-1, (p14._HEADS, -1)).transpose(1, 2) for proj in (mixer.q_proj, mixer.k_proj))
            weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]
            masses.append((weights * needles.noise[:, None]).sum(-1).mean(1))
            x = block(x)
    measured = p14.distractor_mass("dense", model, needles)
    torch.testing.assert_close(measured, torch.stack(masses).mean(0))  # float32 defaults


def test_padding_gets_no_attention_under_a_mask() -> None:
    needles = _needles()
    only_padding = Needles(needles.tokens, needles.key_mask, ~needles.key_mask, needles.answers)
    assert p14.distractor_mass("masked", _model("masked"), only_padding).abs().max() == 0


def test_tokens_that_left_get_no_attention() -> None:
    """Where pruning keeps the reading token alone, the second layer has nothing but it to attend to."""
    encoder, needles = _model("dense"), _needles()
    assert isinstance(encoder, Encoder)
    model = p14._reduced(encoder, TokenPruning(1)).eval()
    first_layer_only = p14.distractor_mass("pruning", model, needles)
    assert (first_layer_only <= 0.5).all()
    assert (first_layer_only > 0).all()


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(14, "dense", "quick", 0), m) for m in measured["dense"]]
    finding = EXPERIMENT.finding(Results(records))
    assert "With 95% noise" in finding
    assert "of its attention" in finding


def test_the_finding_tells_each_seed_where_there_are_several(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(14, "dense", "quick", seed), m) for seed in (0, 1) for m in measured["dense"]]
    assert "by seed) instead of" in EXPERIMENT.finding(Results(records))
    assert "by seed" not in EXPERIMENT.finding(Results([record for record in records if record[0].seed == 0]))


def test_notes_tell_which_methods_know_how_much_evidence_there_is(measured: dict[str, list[Measurement]]) -> None:
    (note,) = EXPERIMENT.notes(Results([(Cell(14, "dense", "quick", 0), measured["dense"][0])]))
    assert "top-k keeps 8 keys" in note
    assert "pruning keeps 12 tokens" in note
