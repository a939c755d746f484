"""Problem 11: every arm measures what is shown, and distances, heads and powers are read as they are defined."""

import itertools
import math
import operator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.digits import SIZE, load_digit_images
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import BatchLoss, TrainingLog, TrainingPlan, train
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p11_attention_over_smoothing import experiment as p11
from transformer_problems.problems.p11_attention_over_smoothing.depth import (
    gated_heads,
    head_importance,
    mean_cosine,
    rank_one_distance,
    states_by_depth,
)
from transformer_problems.problems.p11_attention_over_smoothing.without_skips import NoSkip, attention_only
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.training.drop_head import DropHead

EXPERIMENT = p11.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
WIDTH, LAYERS, STEPS = 16, 3, 10
TINY = p11._Size(WIDTH, LAYERS, steps=STEPS, batch_size=4, num_images=8, num_looked_at=8, seeds=1)
LENGTHS = [2, 63, 64, 97, 100]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p11._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(11, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _values(measurements: list[Measurement], metric: str, x: float | None = None) -> list[float]:
    return [m.value for m in measurements if (m.metric, m.x) == (metric, x)]


def _model(arm: str) -> VisionTransformer:
    with seeded(0, "model"):
        return p11.build_model(arm, WIDTH, LAYERS).eval()


def _images(num: int = 5) -> Tensor:
    return torch.rand(num, 1, SIZE, SIZE, generator=generator(0))


def _tokens(length: int, *, width: int = 6) -> Tensor:
    return torch.randn(3, length, width, generator=generator(1), dtype=torch.float64)


def _mixers(model: nn.Module) -> list[SelfAttention]:
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, LAYERS if c.at == "last" else c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, LAYERS if e.at == "last" else e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, layer) for layer in range(LAYERS + 1)}
    if arm != "no_skips":  # attention alone is the same for all arms
        shown.remove(("collapse_power", None))
    assert shown <= found


def test_no_two_arms_are_one_model() -> None:
    assert len({str(_model(arm)) for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_distance_is_zero_where_all_tokens_are_one(length: int) -> None:
    x = _tokens(1).expand(-1, length, -1)
    assert rank_one_distance(x).tolist() == pytest.approx([0, 0, 0], abs=1e-15)  # the mean's rounding in float64


@pytest.mark.parametrize("length", [1, *LENGTHS])
def test_the_distance_equals_the_naive_formula(length: int) -> None:
    x = _tokens(length)
    expected = []
    for tokens in x.tolist():
        mean = [sum(column) / length for column in zip(*tokens, strict=True)]
        spread = sum((a - m) ** 2 for token in tokens for a, m in zip(token, mean, strict=True))
        expected.append(math.sqrt(spread / sum(a**2 for token in tokens for a in token)))
    assert rank_one_distance(x).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)  # float64


def test_no_other_matrix_of_equal_rows_is_nearer() -> None:
    x = _tokens(10)
    others = x.mean(dim=1, keepdim=True) + 0.1 * torch.randn(50, 3, 1, 6, generator=generator(2), dtype=torch.float64)
    distances = (x - others).flatten(2).norm(dim=2) / x.flatten(1).norm(dim=1)
    assert (distances > rank_one_distance(x)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_mean_cosine_equals_the_naive_double_loop(length: int) -> None:
    x = _tokens(length)
    expected = []
    for tokens in x.tolist():
        pairs = itertools.permutations(tokens, 2)
        cosines = [sum(map(operator.mul, a, b)) / (math.hypot(*a) * math.hypot(*b)) for a, b in pairs]
        expected.append(sum(cosines) / len(cosines))
    assert mean_cosine(x).tolist() == pytest.approx(expected, abs=1e-12)  # float64


def test_the_mean_cosine_knows_one_direction_two_opposite_and_right_angles() -> None:
    along = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    opposite = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    assert mean_cosine(along[None]).item() == 1
    assert mean_cosine(opposite[None]).item() == -1
    assert mean_cosine(torch.eye(3)[None]).item() == 0


@pytest.mark.parametrize("arm", ARMS)
def test_states_are_what_the_model_answers_from(arm: str) -> None:
    model, images = _model(arm), _images()
    states = states_by_depth(model, images)
    assert len(states) == LAYERS + 1
    assert all(state.shape == (5, 17, WIDTH) for state in states)  # 16 patches and the class token
    with torch.no_grad():
        torch.testing.assert_close(states[0][:, 1:], model.embed(images))
        torch.testing.assert_close(model.head[0](model.norm(states[-1])[:, 0]), model(images))


def test_states_are_those_between_layers_and_hooks_are_gone_after() -> None:
    model, images = _model("residual"), _images()
    states = states_by_depth(model, images)
    with torch.no_grad():
        for block, before, after in zip(model.blocks, states[:-1], states[1:], strict=True):
            torch.testing.assert_close(block(before), after)
        model(images)
    assert len(states) == LAYERS + 1


@pytest.mark.parametrize("arm", ARMS)
def test_gates_of_one_change_nothing(arm: str) -> None:
    model, images = _model(arm), _images()
    with torch.no_grad():
        before = model(images)
        with ExitStack() as hooks:
            gates = gated_heads(model, hooks)
            assert torch.equal(model(images), before)
            for gate in gates:
                gate.zero_()
            if arm != "re_zero":  # whose sublayers are switched off at the start
                assert not torch.equal(model(images), before)
        assert torch.equal(model(images), before)  # the hooks are gone
    assert [gate.shape for gate in gates] == [(p11._HEADS,)] * LAYERS


def test_importance_is_the_slope_of_the_loss_at_each_gate() -> None:
    model, images, step = _model("residual").double(), _images().double(), 1e-6
    with ExitStack() as hooks:
        gates = gated_heads(model, hooks)

        def loss() -> Tensor:
            return nn.functional.cross_entropy(model(images), torch.arange(5))

        def loss_at(layer: int, head: int, value: float) -> float:
            with torch.no_grad():
                gates[layer][head] = value
                moved = float(loss())
                gates[layer][head] = 1
            return moved

        importance = head_importance(loss(), gates)
        assert importance.shape == (LAYERS, p11._HEADS)
        for layer, head in itertools.product(range(LAYERS), range(p11._HEADS)):
            slope = (loss_at(layer, head, 1 + step) - loss_at(layer, head, 1 - step)) / (2 * step)
            # differences of 1e-6 in float64 leave ten digits of a loss of order one
            assert float(importance[layer, head]) == pytest.approx(abs(slope), rel=1e-4, abs=1e-9)


def test_one_head_that_alone_matters_has_all_the_weight() -> None:
    model = _model("residual")
    width = WIDTH // p11._HEADS
    for mixer, head in zip(_mixers(model), (2, 0, 3), strict=True):
        alone = torch.zeros(WIDTH)
        alone[head * width : (head + 1) * width] = 1
        with torch.no_grad():
            mixer.out_proj.weight *= alone  # what leaves the other heads is not read
    with ExitStack() as hooks:
        gates = gated_heads(model, hooks)
        importance = head_importance(nn.functional.cross_entropy(model(_images()), torch.arange(5)), gates)
    assert importance.argmax(dim=1).tolist() == [2, 0, 3]
    assert (importance > 0).sum() == LAYERS
    assert p11.dominance(model, _images(), torch.arange(5)) == 1


def test_heads_that_are_all_the_same_share_the_weight() -> None:
    model, width = _model("residual"), WIDTH // p11._HEADS
    with torch.no_grad():
        for mixer in _mixers(model):
            for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
                proj.weight.copy_(proj.weight[:width].repeat(p11._HEADS, 1))
            mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, :width].repeat(1, p11._HEADS))
    dominance = p11.dominance(model, _images(), torch.arange(5))
    assert dominance == pytest.approx(1 / p11._HEADS, rel=1e-5)  # float32


def test_dominance_sums_what_each_image_says_of_a_head() -> None:
    """Slopes of opposite sign in two images both count, so images are asked one by one."""
    model, images, digits = _model("residual"), _images(), torch.arange(5)
    total = torch.zeros(LAYERS, p11._HEADS)
    for i in range(5):
        with ExitStack() as hooks:
            gates = gated_heads(model, hooks)
            total += head_importance(nn.functional.cross_entropy(model(images[i : i + 1]), digits[i : i + 1]), gates)
    shares = [max(layer) / sum(layer) for layer in total.tolist()]
    assert p11.dominance(model, images, digits) == pytest.approx(sum(shares) / LAYERS, rel=1e-5)  # float32


def test_attention_alone_cubes_small_distances() -> None:
    """Dong et al. 2021, theorem 2.2: a tenth of the distance leaves a thousandth of it."""
    with seeded(0):
        (layer,) = attention_only(WIDTH, p11._HEADS, num_layers=1)
    mean, spread = _tokens(1, width=WIDTH), _tokens(20, width=WIDTH)
    with torch.no_grad():
        first, second = (rank_one_distance(layer(mean + size * spread)) for size in (1e-2, 1e-3))
    powers = (first / second).log10()
    assert powers.tolist() == pytest.approx([3, 3, 3], abs=0.05)  # terms of fourth order, of a hundredth


class _Power(nn.Module):
    """Moves the tokens so that their distance r becomes s (r / s)^p with s = 0.6, which no image of noise exceeds."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        spread, size = x - mean, mean.expand_as(x).flatten(1).norm(dim=1)
        wanted = 0.6 * (rank_one_distance(x) / 0.6) ** self.power
        length = size * wanted / (1 - wanted**2).sqrt()
        return mean + spread * (length / spread.flatten(1).norm(dim=1))[:, None, None]


def _collapse_of_planted(monkeypatch: pytest.MonkeyPatch, power: float) -> list[Measurement]:
    def plant(embed_dim: int, num_heads: int, num_layers: int) -> nn.ModuleList:
        return nn.ModuleList(_Power(power) for _ in range(num_layers))

    monkeypatch.setattr(p11, "attention_only", plant)
    return list(p11.collapse_of_pure_attention(_model("no_skips"), 0, _images()))


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_the_power_of_planted_layers_is_read_image_by_image(monkeypatch: pytest.MonkeyPatch, power: float) -> None:
    found = _collapse_of_planted(monkeypatch, power)
    assert _values(found, "collapse_power") == pytest.approx([power] * 5, rel=1e-3)  # a distance of 1e-13 has 3 digits
    distances = [_values(found, "pure_attention_distance", layer)[0] for layer in range(5)]
    assert distances == sorted(distances, reverse=True)


def test_no_power_is_fitted_to_what_rounding_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _collapse_of_planted(monkeypatch, 6.0)
    assert len(_values(found, "pure_attention_distance", 4)) == 1
    assert _values(found, "collapse_power") == []


@pytest.mark.parametrize("seed", range(3))
def test_the_power_of_attention_alone_is_near_three(seed: int) -> None:
    with seeded(seed, "model"):
        model = p11.build_model("no_skips", 32, LAYERS)
    digits = load_digit_images()[1].pixels[:32]
    found = list(p11.collapse_of_pure_attention(model, seed, digits))
    powers = _values(found, "collapse_power")
    assert len(powers) == 32
    assert abs(sum(powers) / 32 - 3) < 0.5  # the law holds at small distances, and these start at a half


def test_no_skip_is_the_sublayer_alone() -> None:
    layer, x = NoSkip(6, dtype=torch.float64), _tokens(7)
    torch.testing.assert_close(layer(x, lambda h: 2 * h), 2 * nn.functional.layer_norm(x, (6,)))
    assert layer(x, torch.zeros_like).abs().max() == 0
    torch.testing.assert_close(PreNorm(6, dtype=torch.float64)(x, torch.zeros_like), x)  # which has the skip


def test_without_skips_nothing_passes_a_layer_that_is_switched_off() -> None:
    states = {}
    for arm in ("no_skips", "residual"):
        model = _model(arm)
        for block in model.blocks:
            nn.init.zeros_(block.mixer.out_proj.weight)
        states[arm] = states_by_depth(model, _images())
    assert (rank_one_distance(states["no_skips"][-1]) < 1e-6).all()  # float32's rounding: every token is alike
    assert (rank_one_distance(states["residual"][-1]) > 0.1).all()


def test_the_rate_of_dropped_heads_reaches_every_op_in_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates: list[set[float]] = []

    def note(model: nn.Module, batch_loss: BatchLoss, plan: TrainingPlan, **options: object) -> TrainingLog:
        def noted_loss(model: nn.Module, step: int) -> Tensor:
            ops = [module for module in model.modules() if isinstance(module, DropHead)]
            assert len(ops) == LAYERS
            assert all(op.training for op in ops)
            rates.append({op.rate for op in ops})
            return batch_loss(model, step)

        return train(model, noted_loss, plan)

    monkeypatch.setattr(p11, "train", note)
    monkeypatch.setitem(p11._SIZES, "quick", TINY)
    list(EXPERIMENT.measure(_bench("drop_head", tmp_path)))
    assert [len(at_step) for at_step in rates] == [1] * STEPS  # all layers alike
    # down within a tenth of the steps, which is one, then evenly up
    assert [rate for (rate,) in rates] == pytest.approx([0.2] + [0.2 * i / 8 for i in range(9)])


@pytest.mark.parametrize("arm", sorted({*ARMS} - {"drop_head"}))
def test_only_drop_head_is_regulated(arm: str) -> None:
    assert p11._recipe(arm).regulators == ()


@pytest.mark.parametrize("arm", ["no_skips", "residual"])
def test_every_image_is_measured_in_every_layer(measured: dict[str, list[Measurement]], arm: str) -> None:
    for metric, layer in itertools.product(
        ("rank_one_distance", "cosine", "rank_one_distance_at_start", "cosine_at_start"), range(LAYERS + 1)
    ):
        assert len(_values(measured[arm], metric, layer)) == TINY.num_images
    assert set(_values(measured[arm], "accuracy")) <= {0.0, 1.0}
    (dominance,) = _values(measured[arm], "head_dominance")
    assert 1 / p11._HEADS <= dominance <= 1


def test_all_arms_see_the_same_images(measured: dict[str, list[Measurement]]) -> None:
    """Arms of a seed begin with the same embedding, but for the one whose joins are drawn before it."""
    first = _values(measured["residual"], "rank_one_distance_at_start", 0)
    alike = [arm for arm in ARMS if arm != "unet_skips"]
    assert all(_values(measured[arm], "rank_one_distance_at_start", 0) == first for arm in alike)


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    found = measured["no_skips"]
    finding = EXPERIMENT.finding(Results([(Cell(11, "no_skips", "quick", 0), m) for m in found]))
    distances, powers = _values(found, "rank_one_distance", LAYERS), _values(found, "collapse_power")
    assert f"differ by {sum(distances) / len(distances):.0e} of their size after {LAYERS} layers" in finding
    assert f"to the power {sum(powers) / len(powers):.1f}," in finding
    without = [(Cell(11, "no_skips", "quick", 0), m) for m in found if m.metric != "collapse_power"]
    assert EXPERIMENT.finding(Results(without)) == finding.split(";")[0] + "."
