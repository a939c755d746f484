"""Problem 15: evidence is where it is said to be, every arm measures what is shown, and what is known is found."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p15_poor_interpretability import classifiers, explanations, found_heads, planted
from transformer_problems.problems.p15_poor_interpretability import experiment as p15
from transformer_problems.problems.p15_poor_interpretability.classifiers import ClassifierPlan, examples
from transformer_problems.problems.p15_poor_interpretability.planted import VOTES, Planted, blanked, plant
from transformer_problems.solutions.interpretability.head_ablation import ablate_heads
from transformer_problems.solutions.interpretability.sites import Site

EXPERIMENT = p15.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
PLAN = ClassifierPlan(8, 20, steps=2, batch_size=4)
TINY = p15._Size((1, 2), PLAN, num_known=8, num_examples=40, num_flows=4, repeats=1, seeds=1)
NUM_VOTES, LENGTH = sum(VOTES), PLAN.length


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p15._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path, seed: int = 0) -> Bench:
    return Bench(Cell(15, arm, "quick", seed), torch.device("cpu"), ModelCache(folder, "test"), lambda done: None)


def _text(num: int = 6) -> Tensor:
    return torch.randint(256, (num, LENGTH), generator=generator(0, "bytes"))


def _planted(num: int = 6) -> Planted:
    return plant(_text(num), generator(0, "planted"))


def _values(measurements: list[Measurement], metric: str, x: float) -> list[float]:
    return [m.value for m in measurements if (m.metric, m.x) == (metric, x)]


def _told(tokens: Tensor) -> Tensor:
    """The class that a planted token tells."""
    return (tokens - 258) // 4


class _Counting(nn.Module):
    """An encoder's face around a counter: the logit of a class is how many tokens tell it, less those that tell others.

    A head that is not there moves nothing, so that what each token is worth is known on paper.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.embedding = nn.Embedding(planted.VOCAB_SIZE, planted.NUM_CLASSES)
        weight = torch.zeros(planted.VOCAB_SIZE, planted.NUM_CLASSES)
        for token in range(258, planted.VOCAB_SIZE):
            weight[token] = -0.5
            weight[token, (token - 258) // 4] = 1.0
        self.body.embedding.weight = nn.Parameter(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        counted: Tensor = self.body.embedding(tokens).sum(dim=1, keepdim=True)
        return counted.expand(-1, tokens.shape[1], -1)


def test_most_planted_tokens_tell_the_answer_and_the_rest_two_other_classes() -> None:
    text, found = _text(), _planted()
    for row in range(len(found)):
        told = _told(found.tokens[row][found.planted[row]]).bincount(minlength=8)
        assert sorted(told.tolist(), reverse=True)[:4] == [*VOTES, 0]
        assert told.argmax() == found.answers[row]
        assert (_told(found.tokens[row][found.evidence[row]]) == found.answers[row]).all()
    assert (found.evidence.sum(dim=1) == VOTES[0]).all()
    assert torch.equal(found.tokens[:, 1:][~found.planted[:, 1:]], text[~found.planted[:, 1:]])
    assert (found.tokens[:, 0] == planted.READ_TOKEN).all()
    assert torch.equal(found.candidates, torch.arange(LENGTH + 1).expand(len(found), -1) > 0)


def test_the_other_text_is_another_text_without_evidence() -> None:
    text, found = _text(), _planted()
    assert torch.equal(found.other_text[1:, 1:], text[:-1])
    assert torch.equal(found.other_text[0, 1:], text[-1])
    assert (found.other_text[:, 1:] < planted.BLANK_TOKEN).all()


def test_evidence_stands_anywhere_and_tells_every_class() -> None:
    found = _planted(2000)
    shares = found.planted[:, 1:].double().mean(dim=0)
    expected = NUM_VOTES / LENGTH
    error = math.sqrt(expected * (1 - expected) / 2000)
    assert (shares - expected).abs().max() < 5 * error  # 20 places: one in 100,000 draws strays so far
    assert found.answers.bincount().min() > 150  # 250 expected, with a deviation of 15
    assert {*found.tokens[found.planted].tolist()} == {*range(258, planted.VOCAB_SIZE)}


def test_any_share_of_training_text_is_blank() -> None:
    text = torch.zeros(400, 100, dtype=torch.int64)
    shares = (blanked(text, generator(0)) == planted.BLANK_TOKEN).double().mean(dim=1)
    assert shares.min() < 0.05
    assert shares.max() > 0.95
    assert abs(float(shares.mean()) - 0.5) < 0.1  # the deviation of the mean is 0.015


def test_batches_are_cut_in_rows() -> None:
    whole = _planted(6)
    part = whole.rows(2, 4)
    assert len(part) == 2
    assert torch.equal(part.tokens, whole.tokens[2:4])
    assert torch.equal(part.evidence, whole.evidence[2:4])


def test_what_is_explained_was_not_learned_from() -> None:
    text = load_text()
    known, asked = examples(text.valid, 8, PLAN, "known"), examples(text.test, 8, PLAN, "explained")
    assert not {*map(tuple, known.tokens.tolist())} & {*map(tuple, asked.tokens.tolist())}
    assert torch.equal(asked.tokens, examples(text.test, 8, PLAN, "explained").tokens)


def test_area_under_the_curve_equals_sklearns_ties_included() -> None:
    found = _planted()
    scores = torch.randint(4, found.tokens.shape, generator=generator(0, "scores")).double()
    areas = p15.auc(scores, found.evidence, found.candidates & ~found.evidence)
    for row, area in enumerate(areas.tolist()):
        real = found.candidates[row]
        expected = roc_auc_score(found.evidence[row][real].numpy(), scores[row][real].numpy())
        assert area == pytest.approx(expected, abs=1e-12)  # counts of pairs in float64


def test_area_is_one_for_the_evidence_half_for_nothing_and_zero_upside_down() -> None:
    found = _planted()
    others = found.candidates & ~found.evidence
    for scores, area in (
        (found.evidence.double(), 1.0),
        (torch.ones(found.tokens.shape), 0.5),
        (-1.0 * found.evidence, 0.0),
    ):
        assert p15.auc(scores, found.evidence, others).tolist() == [area] * len(found)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, 2 if c.at == "last" else c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, 2) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, layers) for layers in (1, 2)}
    assert shown <= found


def test_the_chart_draws_arms_that_are_there() -> None:
    assert {*EXPERIMENT.chart.draws} <= {*ARMS}


@pytest.mark.parametrize("metric", ["auc", "auc_among_planted", "comprehensiveness", "sufficiency"])
@pytest.mark.parametrize("arm", ARMS)
def test_each_example_is_measured_once(measured: dict[str, list[Measurement]], arm: str, metric: str) -> None:
    num = TINY.num_flows if arm == "flow" else TINY.num_examples
    repeats = [m.repeat for m in measured[arm] if (m.metric, m.x) == (metric, 2)]
    assert repeats == [*range(num)]
    low = 0 if metric.startswith("auc") else -1
    assert all(low <= value <= 1 for value in _values(measured[arm], metric, 2))


def test_random_scores_are_drawn_anew_for_each_batch() -> None:
    explain = explanations.explanation_of("random", _model(1), _planted(), seed=0)
    assert not torch.equal(explain(_planted()).scores, explain(_planted()).scores)


def test_all_arms_explain_one_model_of_a_depth_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(p15._SIZES, "quick", TINY)
    trained: list[int] = []
    monkeypatch.setattr(classifiers, "train", lambda model, *rest, **named: trained.append(len(model.body.blocks)))
    for arm in ARMS:
        list(EXPERIMENT.measure(_bench(arm, tmp_path)))
    assert trained == [1, 2]
    list(EXPERIMENT.measure(_bench(ARMS[0], tmp_path, seed=1)))
    assert trained == [1, 2, 1, 2]


def test_training_text_is_blanked_and_no_other_text_is_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def look(model: nn.Module, batch_loss, plan, **named: object) -> None:
        hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for step in range(8):
            assert batch_loss(model, step).isfinite()
        hook.remove()

    monkeypatch.setattr(classifiers, "train", look)
    text = load_text()
    plan = ClassifierPlan(8, 100, steps=2, batch_size=4)
    classifiers.trained_classifier(_bench("rollout", tmp_path), plan, 1, text, lambda done: None)
    learned = bytes(text.train.tolist())
    tokens = torch.cat(seen)
    assert (tokens == planted.BLANK_TOKEN).any()
    runs = [run for row in tokens[:, 1:].tolist() for run in _byte_runs(row) if len(run) > 12]
    assert runs
    assert all(run in learned for run in runs)


def _byte_runs(row: list[int]) -> list[bytes]:
    """Stretches of bytes between tokens that are none."""
    return [bytes(map(int, run.split())) for run in " ".join(str(t) if t < 256 else "|" for t in row).split("|")]


def _model(num_layers: int) -> Encoder:
    with seeded(0, "model"):
        return classifiers.build_classifier(PLAN, num_layers).eval()


def test_patching_gives_each_token_what_it_is_worth() -> None:
    """Of a model that counts: one for evidence, minus a half for what tells another class, nothing for text."""
    found = _planted()
    scores = explanations.patched_tokens(_Counting(), found).scores  # type: ignore[arg-type]
    worth = torch.zeros(found.tokens.shape).masked_fill(found.planted, -0.5).masked_fill(found.evidence, 1.0)
    torch.testing.assert_close(scores.float(), worth, atol=1e-5, rtol=0)  # sums of halves in float32


def test_a_probe_finds_evidence_that_the_hidden_state_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = _planted(64), plant(_text(64), generator(1, "planted"))
    shows = {id(known.tokens): known.evidence, id(asked.tokens): asked.evidence}

    def hidden(model: Encoder, tokens: Tensor) -> Tensor:
        return nn.functional.pad(shows[id(tokens)].float()[..., None], (0, 3))

    monkeypatch.setattr(explanations, "last_hidden", hidden)
    probe = explanations.EvidenceProbe(_model(1), known)
    others = asked.candidates & ~asked.evidence
    assert p15.auc(probe(asked).scores, asked.evidence, others).tolist() == [1.0] * 64
    assert explanations.probe_scores(_model(1), known).accuracy == 1.0


def test_a_probe_of_the_model_reads_its_last_layer() -> None:
    model, found = _model(2), _planted()
    with torch.no_grad():
        x = model.body.embed(found.tokens, torch.arange(LENGTH + 1))
        for block in model.body.blocks:
            x = block(x)
    torch.testing.assert_close(explanations.last_hidden(model, found.tokens), x)  # float32 defaults


def test_probes_learn_from_as_many_other_tokens_as_evidence() -> None:
    found = _planted()
    labels = explanations.probed_labels(found)
    assert torch.equal(labels == 1, found.evidence)
    assert ((labels == 0).sum(dim=1) == VOTES[0]).all()
    assert (labels[:, 0] == -100).all()  # the reading token is neither


def test_the_only_head_that_answers_is_found_and_its_loss_is_the_answers() -> None:
    """All values of the other heads are zero: without them nothing is lost, without the one everything that it did."""
    model, found, known = _model(2), _planted(16), plant(_text(16), generator(1, "planted"))
    head = Site("body.blocks.1.mixer", 2)
    size = PLAN.width // classifiers.NUM_HEADS
    with torch.no_grad():
        for i, block in enumerate(model.body.blocks):
            values = block.mixer.v_proj.weight
            kept = values[2 * size : 3 * size].clone()
            values.zero_()
            if i == 1:
                values[2 * size : 3 * size] = kept
    assert found_heads.heads_by_effect(model, known)[0] == head
    lost, others = found_heads.ablation_losses(model, found, known)
    assert others.abs().max() < 1e-6  # probabilities in float32

    def probability() -> Tensor:
        return model(found.tokens)[:, 0].softmax(-1)[torch.arange(16), found.answers]

    with torch.no_grad():
        whole = probability()
        # two of eight heads are ablated: the second found one gives zero either way
        with ablate_heads(model, [head], mean_over=known.tokens):
            without = probability()
    torch.testing.assert_close(lost, whole - without)  # float32 defaults
    assert lost.abs().max() > 1e-4


def test_the_finding_names_the_baselines_figures(measured: dict[str, list[Measurement]]) -> None:
    finding = EXPERIMENT.finding(_results(measured, ["last_attention"]))
    for layers in (1, 2):
        assert f"{np.mean(_values(measured['last_attention'], 'auc', layers)):.3f} with {layers} layer" in finding
    assert f"{np.mean(_values(measured['last_attention'], 'accuracy', 2)):.0%} of the examples" in finding


def test_notes_name_the_settings_and_what_single_arms_tell(measured: dict[str, list[Measurement]]) -> None:
    notes = EXPERIMENT.notes(_results(measured, ARMS))
    assert len(notes) == 6
    standard = p15._SIZES["quick"].plan
    assert f"width {standard.width}" in notes[0]
    assert "4 tell the answer, one of 8 classes, and 3 and 2 tell two other classes" in notes[0]
    selectivity = np.mean(_values(measured["probing"], "selectivity", 2))
    lost = np.mean(_values(measured["mechanistic"], "loss_without_found_heads", 2))
    assert f"(selectivity {selectivity:.2f})." in notes[3]
    assert f"{lost:.2f} against" in notes[4]
    assert "2 layers." in notes[5]


def test_notes_of_an_unfinished_run_leave_out_what_was_not_measured(measured: dict[str, list[Measurement]]) -> None:
    assert len(EXPERIMENT.notes(_results(measured, ["rollout"]))) == 3


def _results(measured: dict[str, list[Measurement]], arms: list[str]) -> Results:
    return Results([(Cell(15, arm, "quick", 0), m) for arm in arms for m in measured[arm]])
