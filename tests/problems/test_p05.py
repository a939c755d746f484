"""Problem 05: every arm measures what is shown, few examples are nested in more and never of the test, distances by
hand, and arms of one kind are as large as each other."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import MissingDependencyError
from transformer_problems.core.records import Cell, Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.digits import SIZE
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.summary import baseline_of
from transformer_problems.lab.training import BatchLoss, TrainingPlan
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p05_no_local_inductive_bias import experiment as p05
from transformer_problems.problems.p05_no_local_inductive_bias.distance import attention_distances
from transformer_problems.problems.p05_no_local_inductive_bias.task import Examples, Form, built_in_task
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

EXPERIMENT = p05.EXPERIMENT
SPEECH = ("encoder", "conformer")
HAS_SPEECH = importlib.util.find_spec("aeon") is not None
needs_speech = pytest.mark.skipif(not HAS_SPEECH, reason="the package aeon, which carries the speech, is not installed")
ARMS = [pytest.param(a.slug, marks=needs_speech if a.slug in SPEECH else ()) for a in EXPERIMENT.arms]
EXAMPLES = (20, 90, 120)  # those that the table names, and more
STEPS = 2
TINY = p05._Size(EXAMPLES, EXAMPLES, 8, STEPS, STEPS, batch_size=4, seeds=1)  # no scale below 8 has whole heads
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size; of speech, where there is some."""
    folder = tmp_path_factory.mktemp("models")
    arms = [arm.slug for arm in EXPERIMENT.arms if HAS_SPEECH or arm.slug not in SPEECH]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p05._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in arms}


def _bench(arm: str, folder: Path, *, seed: int = 0) -> Bench:
    return Bench(Cell(5, arm, "quick", seed), CPU, ModelCache(folder, "test"), lambda done: None)


def _values(measurements: list[Measurement], metric: str, x: float | None = None) -> list[float]:
    return [m.value for m in measurements if (m.metric, m.x) == (metric, x)]


def _examples(arm: str) -> tuple[Examples, Examples]:
    task = built_in_task(arm)
    return task.known, task.tested


def _rows(inputs: tuple[Tensor, ...]) -> list[tuple[float, ...]]:
    """Each example's inputs as one row: its features and, for utterances, which frames are real."""
    return [tuple(row) for row in torch.cat([part.flatten(1).float() for part in inputs], dim=1).tolist()]


def _known(examples: Examples) -> dict[tuple[float, ...], int]:
    return dict(zip(_rows(examples.inputs), examples.classes.tolist(), strict=True))


class _Oracle(nn.Module):
    """Knows every example's class, and notes what it is shown in training and in test."""

    def __init__(self, *parts: Examples) -> None:
        super().__init__()
        self.known = {row: c for part in parts for row, c in _known(part).items()}
        self.learned: set[tuple[float, ...]] = set()
        self.tested: set[tuple[float, ...]] = set()

    def forward(self, inputs: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        rows = _rows((inputs,) if key_mask is None else (inputs, key_mask))
        (self.learned if self.training else self.tested).update(rows)
        classes = torch.tensor([self.known[row] for row in rows])
        return 100.0 * nn.functional.one_hot(classes, 10)


def _look_at_batches(model: nn.Module, batch_loss: BatchLoss, plan: TrainingPlan) -> None:
    """In place of training; so many steps that batches of `EXAMPLES[0]` leave out no example of 120."""
    model.train()
    assert all(float(batch_loss(model, step)) == 0 for step in range(100))  # the oracle is right
    model.eval()


def _oracles(arm: str, folder: Path, *, seed: int = 0) -> tuple[list[_Oracle], list[Measurement]]:
    """What an arm's models, one for each number of examples, were shown; and what was measured of them."""
    oracles: list[_Oracle] = []

    def build(arm: str, scale: int, form: Form) -> nn.Module:
        oracles.append(_Oracle(*_examples(arm)))
        return oracles[-1]

    with pytest.MonkeyPatch.context() as patch:
        size = p05._Size(EXAMPLES, EXAMPLES, 8, STEPS, STEPS, batch_size=EXAMPLES[0], seeds=1)
        patch.setitem(p05._SIZES, "quick", size)
        patch.setattr(p05, "build_model", build)
        patch.setattr(p05, "train", _look_at_batches)
        found = list(EXPERIMENT.measure(_bench(arm, folder, seed=seed)))
    return oracles, found


def _vit(grid: tuple[int, int], width: int, num_heads: int, *, num_class_tokens: int = 1) -> VisionTransformer:
    """Of 2 x 2 patches, in float64."""

    def mixer() -> SelfAttention:
        return SelfAttention(width, num_heads, is_causal=False)

    with seeded(0):
        patches = PatchEmbedding(width, 2, in_channels=1)
        size = (2 * grid[0], 2 * grid[1])
        return VisionTransformer(patches, size, 3, mixer, 10, num_class_tokens=num_class_tokens).double().eval()


def _images(grid: tuple[int, int], num: int = 3) -> Tensor:
    return torch.rand(num, 1, 2 * grid[0], 2 * grid[1], generator=generator(0), dtype=torch.float64)


def _places(grid: tuple[int, int]) -> list[tuple[float, float]]:
    return [(row / grid[0], column / grid[1]) for row in range(grid[0]) for column in range(grid[1])]


def _plant(model: VisionTransformer, attended: list[int]) -> None:
    """Makes patch i attend to patch `attended[i]` alone, in every layer and on any image.

    Positions are all that tokens say, each in a channel of its own, and layers leave them as they are; queries and
    keys are those channels, the queries moved, and so long that the softmax rounds all other weights to zero.
    """
    num = len(attended)
    moved = torch.zeros(num, num, dtype=torch.float64)
    moved[attended, range(num)] = 1
    with torch.no_grad():
        assert isinstance(model.patches, PatchEmbedding)
        for weights in model.patches.parameters():
            weights.zero_()
        model.positions.weight.copy_(torch.eye(num).view_as(model.positions.weight))
        for block in model.blocks:
            block.mixer.q_proj.weight.copy_(100 * moved)
            block.mixer.k_proj.weight.copy_(100 * torch.eye(num))
            block.mixer.out_proj.weight.zero_()
            block.feed_forward.down.weight.zero_()
            block.feed_forward.down.bias.zero_()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, num) for num in EXAMPLES}
    if arm not in ("vit", "cnn"):  # others attend in windows, to coarser grids or along time
        shown = {(metric, x) for metric, x in shown if metric != "attention_distance"}
    assert shown <= found
    assert EXPERIMENT.chart.metric == "accuracy"


@pytest.mark.parametrize("arm", ARMS)
def test_each_test_example_is_measured_once(measured: dict[str, list[Measurement]], arm: str) -> None:
    num = 370 if arm in SPEECH else 300
    for x in EXAMPLES:
        repeats = [m.repeat for m in measured[arm] if (m.metric, m.x) == ("accuracy", x)]
        assert repeats == list(range(num))
        assert set(_values(measured[arm], "accuracy", x)) <= {0.0, 1.0}


@pytest.mark.parametrize("arm", ARMS)
def test_with_all_means_with_most(measured: dict[str, list[Measurement]], arm: str) -> None:
    assert _values(measured[arm], "accuracy_of_all") == _values(measured[arm], "accuracy", EXAMPLES[-1])


@pytest.mark.parametrize("arm", ARMS)
def test_parameters_and_flops_are_the_models(measured: dict[str, list[Measurement]], arm: str) -> None:
    model = p05.build_model(arm, TINY.scale).eval()
    assert _values(measured[arm], "parameters") == [sum(p.numel() for p in model.parameters())]
    one = torch.zeros(1, 29, 12) if arm in SPEECH else torch.zeros(1, 1, SIZE, SIZE)  # 29 frames are the most
    assert _values(measured[arm], "flops") == [count_flops(lambda: model(one))]


@pytest.mark.parametrize("scale", ["quick", "standard", "full"])
def test_arms_of_one_kind_are_as_large_as_their_baseline(scale: Scale) -> None:
    parameters = {
        arm.slug: sum(p.numel() for p in p05.build_model(arm.slug, p05._SIZES[scale].scale).parameters())
        for arm in EXPERIMENT.arms
    }
    for arm in EXPERIMENT.arms:
        baseline = baseline_of(EXPERIMENT, arm)
        assert baseline is None or parameters[arm.slug] == pytest.approx(parameters[baseline], rel=0.1)


def test_speech_compares_with_the_plain_encoder_and_images_with_the_plain_vit() -> None:
    compared = {arm.slug: baseline_of(EXPERIMENT, arm) for arm in EXPERIMENT.arms}
    images = {"vit": None, "cnn": "vit", "swin": "vit", "pyramid": "vit"}
    assert compared == images | {"encoder": "vit", "conformer": "encoder"}
    assert next(arm for arm in EXPERIMENT.arms if arm.slug == "encoder").solution is None  # a control: no verdict


def test_no_two_arms_are_one_model() -> None:
    assert len({str(p05.build_model(arm.slug, 8)) for arm in EXPERIMENT.arms}) == len(EXPERIMENT.arms)


@pytest.mark.parametrize("scale", ["quick", "standard", "full"])
def test_there_are_as_many_examples_as_are_asked_for(scale: Scale) -> None:
    size = p05._SIZES[scale]
    assert size.image_examples[-1] <= len(built_in_task("vit").known.classes)
    assert size.image_examples[0] == size.speech_examples[0] == p05._FEWEST
    if HAS_SPEECH:
        assert size.speech_examples[-1] == len(built_in_task("encoder").known.classes)


@pytest.mark.parametrize("arm", ["vit", pytest.param("encoder", marks=needs_speech)])
def test_a_cell_learns_from_nested_examples_even_over_classes(arm: str, tmp_path: Path) -> None:
    oracles, found = _oracles(arm, tmp_path)
    known, tested = (_known(part) for part in _examples(arm))
    few, more, most = (oracle.learned for oracle in oracles)
    assert [len(few), len(more), len(most)] == list(EXAMPLES)
    assert few < more < most <= known.keys()
    for examples in (few, more, most):
        counts = torch.tensor([known[row] for row in examples]).bincount(minlength=max(known.values()) + 1)
        assert counts.max() - counts.min() <= 1
    assert not most & tested.keys()
    assert all(oracle.tested == tested.keys() for oracle in oracles)
    assert set(_values(found, "accuracy", EXAMPLES[0]) + _values(found, "accuracy_of_all")) == {1.0}


def test_all_arms_of_a_seed_learn_from_the_same_examples(tmp_path: Path) -> None:
    first, other, next_seed = (
        _oracles(arm, tmp_path, seed=seed)[0][0].learned for arm, seed in (("vit", 0), ("swin", 0), ("vit", 1))
    )
    assert first == other
    assert first != next_seed


def test_correct_compares_the_largest_score_with_the_class() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 1.0], [-3.0, -2.0, -1.0]])
    assert p05.correct(nn.Identity(), Examples((scores,), torch.tensor([1, 2, 2])), CPU) == [1.0, 0.0, 1.0]


@needs_speech
def test_padding_behind_an_utterance_changes_no_answer() -> None:
    """So a score does not depend on how long the longest utterance of the test is."""
    utterance = built_in_task("encoder").tested.select(torch.tensor([0]), CPU)
    features, key_mask = utterance.inputs
    num = int(key_mask.sum())
    assert num < key_mask.shape[1]
    for arm in SPEECH:
        model = p05.build_model(arm, 8).eval()
        whole = model(features[:, :num])
        # float32 sums in another order; scores are of order one
        torch.testing.assert_close(p05._answer(model, utterance), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5), (7, 9)])
def test_uniform_attention_looks_as_far_as_places_are_apart(grid: tuple[int, int]) -> None:
    model = _vit(grid, 16, 2)
    for block in model.blocks:
        nn.init.zeros_(block.mixer.q_proj.weight)
    places = _places(grid)
    expected = sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2
    found = attention_distances(model, _images(grid))
    assert found == pytest.approx([expected] * 3, rel=1e-6)  # places are float32


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (5, 5), (6, 6)])
def test_attention_to_oneself_looks_nowhere(grid: tuple[int, int]) -> None:
    num = grid[0] * grid[1]
    model = _vit(grid, num, 1)
    _plant(model, list(range(num)))
    assert attention_distances(model, _images(grid)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 6)])
def test_attention_to_one_other_patch_looks_as_far_as_it_lies(grid: tuple[int, int]) -> None:
    num = grid[0] * grid[1]
    attended = torch.randperm(num, generator=generator(1)).tolist()
    model = _vit(grid, num, 1)
    _plant(model, attended)
    places = _places(grid)
    expected = sum(math.dist(place, places[i]) for place, i in zip(places, attended, strict=True)) / num
    assert attention_distances(model, _images(grid)) == pytest.approx([expected] * 3, rel=1e-6)  # places are float32


@pytest.mark.parametrize("num_class_tokens", [1, 2])
def test_distances_equal_the_naive_formula_without_class_tokens(num_class_tokens: int) -> None:
    """Weights of all tokens with each other; then those of class tokens are dropped and the rest put to one."""
    grid = (3, 4)
    model, images, places = _vit(grid, 16, 2, num_class_tokens=num_class_tokens), _images(grid), _places(grid)
    apart = torch.tensor([[math.dist(a, b) for b in places] for a in places], dtype=torch.float64)
    expected = []
    with torch.no_grad():
        assert model.class_tokens is not None
        model.class_tokens.normal_(std=3.0, generator=generator(2))  # which attracts much of the attention
        x = torch.cat([model.class_tokens.expand(len(images), -1, -1), model.embed(images)], dim=1)
        for block in model.blocks:
            y = block.mixer_residual.norm(x)
            q, k = (proj(y).unflatten(-1, (2, 8)).transpose(1, 2) for proj in (block.mixer.q_proj, block.mixer.k_proj))
            weights = (3 * q @ k.mT / 8**0.5).softmax(dim=-1)[..., num_class_tokens:, num_class_tokens:]
            weights = weights / weights.sum(dim=-1, keepdim=True)
            expected.append(float((weights * apart).sum(dim=-1).mean()))
            block.mixer.q_proj.weight *= 3  # so that attention is far from uniform
            x = block(x)
    assert attention_distances(model, images) == pytest.approx(expected, rel=1e-6)  # places are float32


def test_looking_changes_nothing_and_leaves_no_hooks() -> None:
    model, images = _vit((4, 4), 16, 2), _images((4, 4))
    before = model(images)
    first = attention_distances(model, images)
    assert torch.equal(model(images), before)
    assert attention_distances(model, images) == first
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_without_the_speech_only_its_arms_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    for arm in SPEECH:
        with pytest.raises(MissingDependencyError, match="pip install --no-deps aeon"):
            list(EXPERIMENT.measure(_bench(arm, tmp_path)))
    assert list(EXPERIMENT.measure(_bench("vit", tmp_path)))


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    found = measured["vit"]
    finding = EXPERIMENT.finding(Results([(Cell(5, "vit", "quick", 0), m) for m in found]))
    few, most = (sum(_values(found, "accuracy", x)) / 300 for x in (EXAMPLES[0], EXAMPLES[-1]))
    (first,), (last,) = (_values(found, "attention_distance", layer) for layer in (1, 4))
    assert f"With 20 examples a plain Vision Transformer gets {few:.0%} of images right, with" in finding
    assert f"with {EXAMPLES[-1]} it gets {most:.0%}; its first layer" in finding
    assert (
        f"then looks across {first:.0%} of the image and its last across {last:.0%}, where attention to all" in finding
    )
    assert "alike would look across 50%." in finding  # the mean distance in a grid of 4 x 4
