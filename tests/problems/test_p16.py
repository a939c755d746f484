"""Problem 16: every arm measures what is shown, arithmetic grows as reckoned by hand and buys as many steps, clips
compare with clips, and nothing tested was learned from."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement, Scale
from transformer_problems.lab.data.digits import Images, load_digit_images
from transformer_problems.lab.data.moving_images import SPEEDS, Clips, moving_digits
from transformer_problems.lab.data.upscaled_digits import upscaled
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.summary import baseline_of
from transformer_problems.lab.training import BatchLoss, TrainingPlan
from transformer_problems.problems.p16_dense_inputs import experiment as p16

EXPERIMENT = p16.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
CLIPS = ("clip_pixels", "tubelets", "tubelets_factorised", "swin_clips")
STEPS = 2
TINY = p16._Size(
    (8, 16), (2, 4), 8, STEPS, STEPS, batch_size=4, num_clips=8, seeds=1
)  # no width below 8 has whole heads
IMAGE, CLIP = (8, 8), (2, 12, 12)  # smaller than those trained on at every scale
SCALES: list[Scale] = ["quick", "standard", "full"]
STANDARD = p16._SIZES["standard"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        _shrink(patch)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(p16._SIZES, "quick", TINY)
    patch.setattr(p16, "_IMAGE", IMAGE)
    patch.setattr(p16, "_CLIP", CLIP)


def _bench(arm: str, folder: Path, *, seed: int = 0) -> Bench:
    return Bench(Cell(16, arm, "quick", seed), CPU, ModelCache(folder, "test"), lambda done: None)


def _values(measurements: list[Measurement], metric: str, x: float | None = None) -> list[float]:
    return [m.value for m in measurements if (m.metric, m.x) == (metric, x)]


def _shapes(arm: str, size: p16._Size) -> list[tuple[int, ...]]:
    """Of the inputs that an arm's costs are measured at."""
    if arm in CLIPS:
        return [(num_frames, 12, 12) for num_frames in size.clip_lengths]
    return [(side, side) for side in size.image_sides]


def _rows(inputs: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in inputs.flatten(1).tolist()]


def _counted(arm: str, width: int, shape: tuple[int, ...]) -> int:
    return p16._flops(p16.build_model(arm, width, shape).eval(), torch.zeros(1, 1, *shape))


def _grown(arm: str) -> list[int]:
    """FLOPs of a pass at each size of the standard scale."""
    return [_counted(arm, STANDARD.width, shape) for shape in _shapes(arm, STANDARD)]


def _by_hand(arm: str, width: int, shape: tuple[int, ...]) -> int:
    """FLOPs of a plain Transformer of four layers on a class token and a token for each cut of the input.

    In a layer n tokens of width C pass four projections and a feed-forward network of 4 C, 24 n C^2, and form scores
    and sums with n keys, 4 n^2 C.
    """
    cut = {"pixels": (1, 1), "patches": (4, 4), "clip_pixels": (1, 1, 1), "tubelets": (2, 4, 4)}[arm]
    num_tokens = math.prod(a // b for a, b in zip(shape, cut, strict=True))
    n, num_classes = num_tokens + 1, len(SPEEDS) if arm in CLIPS else 10
    layers = 4 * (24 * n * width**2 + 4 * n**2 * width)
    return layers + 2 * num_tokens * math.prod(cut) * width + 2 * width * num_classes


class _Oracle(nn.Module):
    """Knows every input's class, and notes what it is shown in training and in test."""

    def __init__(self, *parts: p16.Labelled) -> None:
        super().__init__()
        self.known = {
            row: c for inputs, classes in parts for row, c in zip(_rows(inputs), classes.tolist(), strict=True)
        }
        self.learned: set[tuple[float, ...]] = set()
        self.tested: set[tuple[float, ...]] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = _rows(inputs)
        (self.learned if self.training else self.tested).update(rows)
        return 100.0 * nn.functional.one_hot(torch.tensor([self.known[row] for row in rows]), 10)


class _Trainings:
    """In place of training: notes the steps and the weights that each begins with."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.starts: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, batch_loss: BatchLoss, plan: TrainingPlan) -> None:
        self.steps.append(plan.steps)
        self.starts.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.1 * plan.steps  # so that other steps leave other weights
        model.eval()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    xs = [math.prod(shape) for shape in _shapes(arm, TINY)]
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, xs[-1] if c.at == "last" else c.at) for c in EXPERIMENT.columns if c.statistic == "mean"}
    shown |= {(c.metric, x) for c in EXPERIMENT.columns if c.statistic == "exponent" for x in xs}
    shown |= {(e.metric, xs[-1] if e.at == "last" else e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, x) for x in xs}
    assert shown <= found


def test_the_chart_draws_arms_that_are_there() -> None:
    assert {*EXPERIMENT.chart.draws} <= {*ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_each_test_input_is_measured_once(measured: dict[str, list[Measurement]], arm: str) -> None:
    for metric in ("accuracy", "accuracy_at_equal_flops"):
        repeats = [m.repeat for m in measured[arm] if m.metric == metric]
        assert len(set(repeats)) == len(repeats) == 300
        assert set(_values(measured[arm], metric)) <= {0.0, 1.0}


@pytest.mark.parametrize("arm", ARMS)
def test_costs_are_those_of_one_input_of_each_size(measured: dict[str, list[Measurement]], arm: str) -> None:
    costs = [(m.x, m.value) for m in measured[arm] if m.metric == "flops"]
    assert costs == [(math.prod(shape), _counted(arm, TINY.width, shape)) for shape in _shapes(arm, TINY)]
    bytes_by_pixels = [(m.x, m.value) for m in measured[arm] if m.metric == "peak_memory_bytes"]
    assert [x for x, _ in bytes_by_pixels] == [x for x, _ in costs]
    num_parameters = [
        sum(p.numel() for p in p16.build_model(arm, TINY.width, shape).parameters()) for shape in _shapes(arm, TINY)
    ]
    # a training step holds a gradient of 4 bytes for every parameter, and more
    assert all(peak > 4 * num for (_, peak), num in zip(bytes_by_pixels, num_parameters, strict=True))
    if arm.endswith("pixels"):  # where tokens are few, PyTorch may take a convolution that needs more
        assert bytes_by_pixels[0][1] < bytes_by_pixels[-1][1]


@pytest.mark.parametrize("arm", ["pixels", "patches", "clip_pixels", "tubelets"])
def test_flops_are_those_by_hand(arm: str) -> None:
    shapes = _shapes(arm, STANDARD)
    assert _grown(arm) == [_by_hand(arm, STANDARD.width, shape) for shape in shapes]


def test_one_token_a_pixel_grows_quadratically_in_the_end() -> None:
    """From a power near one towards two: of the pixels in images, of the frames in clips."""
    for arm, octaves in (("pixels", 2), ("clip_pixels", 1)):  # of pixels, between one size and the next
        flops = _grown(arm)
        powers = [math.log2(more / less) / octaves for less, more in itertools.pairwise(flops)]
        assert powers == sorted(powers)
        assert 1 < powers[0] < 1.9 < powers[-1] < 2
        far = [_by_hand(arm, STANDARD.width, (2**i, 16) if arm == "pixels" else (2**i, 12, 12)) for i in (20, 21)]
        assert far[1] / far[0] == pytest.approx(4, rel=1e-3)


def test_patches_put_off_what_is_quadratic() -> None:
    """An image costs as much as one a quarter as wide with one token a pixel, but for the embedding of 16 pixels."""
    for side in (16, 64):
        pixels, patches = _counted("pixels", 32, (side // 4, side // 4)), _counted("patches", 32, (side, side))
        assert patches - pixels == 2 * 32 * (side**2 - (side // 4) ** 2)


def test_swin_grows_linearly_in_pixels() -> None:
    head = 2 * 32 * 10  # what is left once a whole image is one vector
    smallest, *rest = (flops - head for flops in _grown("swin"))
    assert [more / less for less, more in itertools.pairwise(rest)] == [4, 4]
    assert 4 < rest[0] / smallest < 4.2  # the last 2 x 2 tokens of 8 x 8 pixels do not fill a window, which shrinks


def test_the_pyramid_grows_linearly_in_pixels() -> None:
    """All but the pooled tokens, whose number is the same for every image."""
    flops = _grown("pyramid")
    growth = [more - less for less, more in itertools.pairwise(flops)]
    assert [more / less for less, more in itertools.pairwise(growth)] == [4, 4]
    assert flops[-1] / flops[-2] == pytest.approx(4, rel=0.05)


def test_swin_and_factorised_tubelets_grow_linearly_in_frames() -> None:
    head = 2 * 32 * len(SPEEDS)
    swin = [flops - head for flops in _grown("swin_clips")]
    assert [more / less for less, more in itertools.pairwise(swin)] == [2, 2, 2]
    factorised = _grown("tubelets_factorised")
    assert factorised[-1] / factorised[-2] == pytest.approx(2, rel=0.01)  # class tokens, and 17 steps with each other
    joint = _grown("tubelets")
    assert joint[-1] / joint[-2] > 2.5


def test_clips_compare_with_one_token_a_pixel_of_clips() -> None:
    compared = {arm.slug: baseline_of(EXPERIMENT, arm) for arm in EXPERIMENT.arms}
    images = {"pixels": None, "patches": "pixels", "pyramid": "pixels", "swin": "pixels"}
    clips = {"tubelets": "clip_pixels", "tubelets_factorised": "clip_pixels", "swin_clips": "clip_pixels"}
    assert compared == images | clips | {"clip_pixels": "pixels"}
    assert next(arm for arm in EXPERIMENT.arms if arm.slug == "clip_pixels").solution is None  # a control: no verdict


@pytest.mark.parametrize("scale", SCALES)
def test_every_size_is_cut_without_a_rest(scale: Scale) -> None:
    """Or an embedding would pad, and pixels that nobody gave would cost."""
    size = p16._SIZES[scale]
    assert all(
        side % 8 == 0 for side in (*size.image_sides, *p16._IMAGE)
    )  # patches of 4; a stride of 2, twice, in Swin
    assert all(num_frames % 2 == 0 for num_frames in (*size.clip_lengths, p16._CLIP[0]))
    assert all(side % 12 == 0 for side in p16._CLIP[1:])  # tubelets of 4, windows of 3 x 3 tokens of 2 and of 4


@pytest.mark.parametrize("arm", ARMS)
def test_affordable_steps_are_those_of_the_flops(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most, shape = p16._MOST_STEPS, p16._CLIP if arm in CLIPS else p16._IMAGE
    monkeypatch.setattr(p16, "_MOST_STEPS", 10**6)
    baseline = _by_hand("clip_pixels" if arm in CLIPS else "pixels", STANDARD.width, shape)
    ratio = baseline / _counted(arm, STANDARD.width, shape)
    assert p16.affordable(arm, STANDARD) == round(ratio) >= 1
    monkeypatch.setattr(p16, "_MOST_STEPS", most)
    assert p16.affordable(arm, STANDARD) == (1 if arm.endswith("pixels") else min(most, round(ratio)))


def test_a_dearer_arm_takes_as_many_steps_as_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = iter([40, 10])  # of the arm, of its baseline
    monkeypatch.setattr(p16, "_flops", lambda model, one: next(flops))
    assert p16.affordable("patches", TINY) == 1


@pytest.mark.parametrize("arm", ARMS)
def test_equal_flops_are_a_run_of_its_own_from_the_same_start(
    arm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainings = _Trainings()
    _shrink(monkeypatch)
    monkeypatch.setattr(p16, "train", trainings)
    monkeypatch.setattr(p16, "_costs", lambda arm, size, device: iter(()))
    found = list(EXPERIMENT.measure(_bench(arm, tmp_path)))
    equal = STEPS * p16.affordable(arm, TINY)
    assert _values(found, "steps_at_equal_flops") == [equal]
    if arm.endswith("pixels"):  # a baseline's equal steps are its equal FLOPs
        assert equal == STEPS
        assert trainings.steps == [STEPS]
        assert _values(found, "accuracy_at_equal_flops") == _values(found, "accuracy")
        return
    assert trainings.steps == [STEPS, equal]
    first, second = trainings.starts
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_accuracy_is_that_of_its_own_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model is right on as many of the test's images as it took steps."""

    def right(model: nn.Module, tested: p16.Labelled, device: torch.device) -> list[float]:
        return [float(i < trainings.steps[-1]) for i in range(100)]

    trainings = _Trainings()
    _shrink(monkeypatch)
    monkeypatch.setattr(p16, "train", trainings)
    monkeypatch.setattr(p16, "affordable", lambda arm, size: 5)
    monkeypatch.setattr(p16, "correct", right)
    found = list(EXPERIMENT.measure(_bench("patches", tmp_path)))
    assert sum(_values(found, "accuracy")) == STEPS
    assert sum(_values(found, "accuracy_at_equal_flops")) == 5 * STEPS


@pytest.mark.parametrize("arm", ["pixels", "tubelets"])
def test_a_cell_never_learns_from_the_test(arm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    oracles: list[_Oracle] = []

    def build(arm: str, width: int, shape: tuple[int, ...]) -> nn.Module:
        oracles.append(_Oracle(*p16.examples(arm, TINY, 0)))
        return oracles[-1]

    def look_at_batches(model: nn.Module, batch_loss: BatchLoss, plan: TrainingPlan) -> None:
        model.train()
        assert all(float(batch_loss(model, step)) == 0 for step in range(100))  # the oracle is right
        model.eval()

    def no_costs(arm: str, size: p16._Size, device: torch.device) -> Iterator[Measurement]:
        return iter(())

    _shrink(monkeypatch)
    monkeypatch.setattr(p16, "build_model", build)
    monkeypatch.setattr(p16, "train", look_at_batches)
    monkeypatch.setattr(p16, "_costs", no_costs)
    monkeypatch.setattr(p16, "affordable", lambda arm, size: 2)
    found = list(EXPERIMENT.measure(_bench(arm, tmp_path)))
    known, tested = ({*_rows(inputs)} for inputs, _ in p16.examples(arm, TINY, 0))
    assert len(oracles) == 2  # after equal steps, after equal FLOPs
    assert not known & tested
    for oracle in oracles:
        assert oracle.learned <= known
        assert len(oracle.learned) >= min(len(known), 100)
        assert oracle.tested == tested
    assert set(_values(found, "accuracy") + _values(found, "accuracy_at_equal_flops")) == {1.0}


def test_images_are_the_digits_drawn_larger() -> None:
    for labelled, digits in zip(p16.examples("swin", TINY, 0), load_digit_images(), strict=True):
        assert labelled[0].shape[1:] == (1, *p16._IMAGE)
        assert torch.equal(labelled[1], digits.classes)
        assert torch.equal(labelled[0], upscaled(digits, p16._IMAGE[0]).pixels)


def test_clips_are_made_of_the_splits_own_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[Images] = []

    def note(digits: Images, num_clips: int, *, num_frames: int, size: int, generator: torch.Generator) -> Clips:
        made_of.append(digits)
        return moving_digits(digits, num_clips, num_frames=num_frames, size=size, generator=generator)

    monkeypatch.setattr(p16, "moving_digits", note)
    (known, speeds), (tested, _) = p16.examples("swin_clips", TINY, 0)
    assert known.shape == (TINY.num_clips, 1, *p16._CLIP)
    assert tested.shape == (300, 1, *p16._CLIP)
    assert int(speeds.max()) < len(SPEEDS)
    for digits, split in zip(made_of, load_digit_images(), strict=True):
        assert torch.equal(digits.pixels, split.pixels)


@pytest.mark.parametrize("arm", ["patches", "tubelets"])
def test_all_seeds_are_tested_alike(arm: str) -> None:
    (known, _), (tested, classes) = p16.examples(arm, TINY, 0)
    (other_known, _), (other_tested, other_classes) = p16.examples(arm, TINY, 1)
    assert torch.equal(tested, other_tested)
    assert torch.equal(classes, other_classes)
    assert torch.equal(known, other_known) == (arm not in CLIPS)  # there are but so many images


def test_correct_compares_the_largest_score_with_the_class() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 1.0], [-3.0, -2.0, -1.0]]).repeat(40, 1)  # more than one batch
    classes = torch.tensor([1, 2, 2]).repeat(40)
    assert p16.correct(nn.Identity(), (scores, classes), CPU) == [1.0, 0.0, 1.0] * 40


def test_no_two_arms_are_one_model() -> None:
    models = {str(p16.build_model(arm, 32, p16._CLIP if arm in CLIPS else p16._IMAGE)) for arm in ARMS}
    assert len(models) == len(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_models_answer_with_the_classes_asked_for(arm: str) -> None:
    shape: tuple[int, ...] = p16._CLIP if arm in CLIPS else p16._IMAGE
    logits = p16.build_model(arm, 8, shape)(torch.zeros(2, 1, *shape))
    assert logits.shape == (2, len(SPEEDS) if arm in CLIPS else 10)


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    found = measured["pixels"]
    finding = EXPERIMENT.finding(Results([(Cell(16, "pixels", "quick", 0), m) for m in found]))
    (few,), (many,) = (_values(found, "flops", x) for x in (64, 256))
    assert f"4 times the pixels take {many / few:.0f} times the arithmetic; trained" in finding
    assert f"tells {sum(_values(found, 'accuracy')) / 300:.0%} of images of 16 x 16 rightly, where chance" in finding
