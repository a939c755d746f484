"""Problem 06: every arm measures what is shown, labels are nested and never of the test, each help is what it says."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.data.excerpts import PACKAGES, SOURCE_PACKAGES, load_unlabelled
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import BatchLoss, TrainingPlan, train
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p06_data_hungry import experiment as p06
from transformer_problems.problems.p06_data_hungry import texts
from transformer_problems.problems.p06_data_hungry.images import (
    image_model,
    image_task,
    masked_image_loss,
    masked_image_model,
    taught_loss,
)
from transformer_problems.problems.p06_data_hungry.task import (
    Labelled,
    Task,
    Teacher,
    correct,
    labelled_loss,
)
from transformer_problems.solutions.training.masked_autoencoder import MaskedAutoencoder

EXPERIMENT = p06.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
LABELS = (10, 100, 500)  # those that the table names
WIDTH, STEPS, FIRST_STEPS = 16, 10, 3  # as many steps as it takes to unfreeze a layer at each of them
TINY = p06._Size(
    LABELS, WIDTH, p06._Budget(STEPS, FIRST_STEPS, 4), p06._Budget(STEPS, FIRST_STEPS, 4), num_excerpts=500, seeds=1
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cells keep the models that they share."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def measured(models: Path) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p06._SIZES, "quick", TINY)
        patch.setattr(texts, "_NUM_SOURCE", 100)
        return {arm: list(EXPERIMENT.measure(_bench(arm, models))) for arm in ARMS}


@pytest.fixture(scope="module")
def task() -> Task:
    """The image task."""
    return image_task()


def _bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(6, arm, "quick", 0), CPU, ModelCache(folder, "test"), lambda done: None)


def _values(measurements: list[Measurement], metric: str, x: float | None = None) -> list[float]:
    return [m.value for m in measurements if (m.metric, m.x) == (metric, x)]


def _last_labels(task: Task, num: int) -> Labelled:
    return task.train[0][-num:], task.train[1][-num:]


def _rows(inputs: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in inputs.flatten(1).tolist()}


class _Seen(nn.Module):
    """Notes every input that it is given, and answers zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, inputs: Tensor, **options: object) -> Tensor:
        self.inputs.append(inputs)
        return torch.zeros(len(inputs), 5)


class _NotedTeacher:
    """Trains a task's teacher and notes on what."""

    def __init__(self, teach: Callable[[Tensor, Tensor], Teacher]) -> None:
        self.teach = teach
        self.lessons: list[Labelled] = []

    def __call__(self, inputs: Tensor, classes: Tensor) -> Teacher:
        self.lessons.append((inputs, classes))
        return self.teach(inputs, classes)


class _NotedTraining:
    """Trains, and notes the plans, and the weights before and after."""

    def __init__(self) -> None:
        self.plans: list[TrainingPlan] = []
        self.before: list[nn.Module] = []
        self.after: list[nn.Module] = []

    def __call__(
        self, model: nn.Module, loss: BatchLoss, plan: TrainingPlan, *, checkpoint: Path | None = None
    ) -> None:
        self.plans.append(plan)
        self.before.append(copy.deepcopy(model))
        train(model, loss, plan, checkpoint=checkpoint)
        self.after.append(copy.deepcopy(model))


def _train_arm(arm: str, folder: Path, task: Task) -> _NotedTraining:
    """The trainings behind an arm's answers after 10 labels, pretraining first."""
    training = _NotedTraining()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p06, "train", training)
        start = p06._Start(_bench(arm, folder), TINY, task, is_text=False)
        p06._answers(start, arm, _last_labels(task, 10))
    return training


def _body(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns if c.metric != "labels_needed"}  # where it is reached
    shown |= {(e.metric, LABELS[-1] if e.at == "last" else e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    shown |= {(EXPERIMENT.chart.metric, num) for num in LABELS}
    if arm.endswith("teacher"):  # compared with nothing, and trained in no steps
        shown.remove(("steps", None))
    assert shown <= found


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_are_tested_on_as_many_examples(measured: dict[str, list[Measurement]], arm: str) -> None:
    for num in LABELS:
        right = _values(measured[arm], "accuracy", num)
        assert len(right) == 300
        assert set(right) <= {0.0, 1.0}


@pytest.mark.parametrize("arm", ["scratch", "teacher", "text_teacher"])
def test_a_cells_area_and_labels_needed_are_those_of_its_curve(
    measured: dict[str, list[Measurement]], arm: str
) -> None:
    curve = {num: _values(measured[arm], "accuracy", num) for num in LABELS}
    assert _values(measured[arm], "label_efficiency") == pytest.approx(p06.areas(curve))
    needed = p06.labels_needed(curve, 0.4 if arm.startswith("text") else 0.8)
    assert _values(measured[arm], "labels_needed") == ([] if needed is None else [needed])


@pytest.mark.parametrize("arm", ARMS)
def test_steps_count_pretraining(measured: dict[str, list[Measurement]], arm: str) -> None:
    is_pretrained = arm.removeprefix("text_") in ("self_supervised", "probe", "fine_tuned", "layerwise")
    steps = [] if arm.endswith("teacher") else [STEPS + FIRST_STEPS * is_pretrained]
    assert _values(measured[arm], "steps") == steps


@pytest.mark.usefixtures("measured")
def test_arms_share_what_is_pretrained(models: Path) -> None:
    """Unlabelled and from the source's labels, for images and for texts."""
    assert len(list(models.glob("*.safetensors"))) == 4


def test_areas_are_those_by_hand() -> None:
    """One decade and then two, so the pieces count one and two thirds."""
    curve = {1: [1, 0, 0, 1, 0], 10: [1, 0, 1, 0, 0], 1000: [1, 1, 1, 0, 0]}
    assert p06.areas(curve) == pytest.approx([1, 1 / 3, 0.5 / 3 + 2 / 3, 0.5 / 3, 0])


def test_labels_needed_are_read_between_points() -> None:
    curve = {10: [1, 0, 0, 0], 100: [0, 1, 1, 1], 500: [0, 0, 1, 0]}
    assert p06.labels_needed(curve, 0.5) == pytest.approx(10**1.5)  # half-way up, so half a decade
    assert p06.labels_needed(curve, 0.375) == pytest.approx(10**1.25)
    assert p06.labels_needed(curve, 0.75) == pytest.approx(100)
    assert p06.labels_needed(curve, 0.25) == 10
    assert p06.labels_needed(curve, 0.1) == 10
    assert p06.labels_needed(curve, 0.76) is None


def test_a_cell_learns_from_nested_labels_and_never_from_the_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task
) -> None:
    learned: list[Labelled] = []

    def note(start: object, arm: str, labelled: Labelled) -> Tensor:
        learned.append(labelled)
        return torch.nn.functional.one_hot(task.test[1])

    monkeypatch.setattr(p06, "_answers", note)
    monkeypatch.setitem(p06._SIZES, "quick", TINY)
    found = list(EXPERIMENT.measure(_bench("scratch", tmp_path)))
    assert [len(classes) for _, classes in learned] == list(LABELS)
    few, more, most = (_rows(inputs) for inputs, _ in learned)
    assert few < more < most
    assert not most & _rows(task.test[0])
    known = dict(zip(map(tuple, task.train[0].flatten(1).tolist()), task.train[1].tolist(), strict=True))
    for inputs, classes in learned:
        assert [known[tuple(row)] for row in inputs.flatten(1).tolist()] == classes.tolist()
    assert set(_values(found, "label_efficiency")) == {1.0}  # always right
    assert _values(found, "labels_needed") == [10.0]


def test_correct_compares_the_largest_score_with_the_class() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 1.0], [-3.0, -2.0, -1.0]])
    assert correct(logits, torch.tensor([1, 2, 2])) == [1.0, 0.0, 1.0]


def test_the_labelled_loss_is_cross_entropy_on_the_batch(task: Task) -> None:
    model, labelled = image_model(WIDTH, 5), _last_labels(task, 30)
    batch = draw_batch(30, 8, seed=0, step=2)
    expected = nn.functional.cross_entropy(model(labelled[0][batch]), labelled[1][batch])
    torch.testing.assert_close(labelled_loss(task, labelled, 8, 0, CPU)(model, 2), expected)


def test_pretraining_on_images_never_sees_the_test(task: Task) -> None:
    model, allowed = _Seen(), torch.cat([task.train[0], task.source[0]])
    masked_image_loss(task, len(allowed), 0, CPU)(model, 0)  # a batch of them all
    (seen,) = model.inputs
    assert not _rows(seen) & _rows(task.test[0])
    assert _rows(seen) == _rows(allowed)


def test_pretraining_on_texts_never_sees_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are masked windows of a text that holds no file of the test, as the data's own tests show."""
    seen: list[Tensor] = []

    def note(windows: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(windows)
        return torch.full_like(windows, MASK_TOKEN), windows

    monkeypatch.setattr(texts, "mask_tokens", note)
    model = texts.text_model(WIDTH, texts.VOCAB_SIZE)
    loss = texts.masked_text_loss(8, 0, CPU)(model, 0)
    allowed = bytes(load_unlabelled((*PACKAGES, *SOURCE_PACKAGES)).tolist())
    (windows,) = seen
    assert windows.shape == (8, texts._LENGTH)
    assert all(bytes(row) in allowed for row in windows.tolist())
    logits = model(torch.full_like(windows, MASK_TOKEN))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), windows.flatten()))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_students_teacher_learns_from_the_labels_alone(task: Task, kind: str, tmp_path: Path) -> None:
    teacher = _NotedTeacher(task.teach)
    noted, labelled = replace(task, teach=teacher), _last_labels(task, 20)
    start = p06._Start(_bench(f"distilled_{kind}", tmp_path), TINY, noted, is_text=False)
    p06._answers(start, f"distilled_{kind}", labelled)
    assert len(teacher.lessons) == 1
    assert torch.equal(teacher.lessons[0][0], labelled[0])
    assert torch.equal(teacher.lessons[0][1], labelled[1])


def test_the_student_learns_labels_and_the_teachers_answers_apart(task: Task) -> None:
    """By the definition, hard: half the cross-entropy with the labels, half that with the teacher's answers."""
    labelled, model = _last_labels(task, 20), image_model(WIDTH, 5, num_class_tokens=2)
    few, many = draw_batch(20, 8, seed=0, step=5), draw_batch(len(task.train[1]), 8, seed=0, step=5)
    answers = task.teach(*labelled)(task.train[0]).argmax(dim=1)
    by_labels = nn.functional.cross_entropy(model.logits_of_heads(labelled[0][few])[:, 0], labelled[1][few])
    by_teacher = nn.functional.cross_entropy(model.logits_of_heads(task.train[0][many])[:, 1], answers[many])
    loss = taught_loss(task, labelled, True, 8, 0, CPU)(model, 5)
    torch.testing.assert_close(loss, (by_labels + by_teacher) / 2)  # float32 defaults


def test_the_probe_leaves_the_body_as_pretrained(tmp_path: Path, task: Task) -> None:
    pretraining, probing = (_train_arm("probe", tmp_path, task).after[i] for i in (0, -1))
    trained, kept = _body(pretraining), _body(probing)
    assert trained.keys() == kept.keys()
    assert all(torch.equal(trained[name], kept[name]) for name in trained)


def test_the_probe_learns_a_head_of_its_own(tmp_path: Path, task: Task) -> None:
    training = _train_arm("probe", tmp_path, task)
    heads = [model.get_parameter("head.0.weight") for model in (training.after[0], training.before[1])]
    assert not torch.equal(*heads)  # the source's head is not taken over
    assert not torch.equal(
        training.before[1].get_parameter("head.0.weight"), training.after[1].get_parameter("head.0.weight")
    )


@pytest.mark.parametrize("arm", ["fine_tuned", "layerwise", "self_supervised"])
def test_all_of_a_pretrained_model_learns_on(arm: str, tmp_path: Path, task: Task) -> None:
    training = _train_arm(arm, tmp_path, task)
    pretrained, (before, after) = training.after[0], (training.before[1], training.after[1])
    if arm == "self_supervised":
        assert isinstance(pretrained, MaskedAutoencoder)
        assert isinstance(pretrained.encoder, VisionTransformer)
        pretrained = pretrained.encoder
    trained, taken, final = _body(pretrained), _body(before), _body(after)
    assert all(torch.equal(trained[name], taken[name]) for name in trained)
    assert all(not torch.equal(taken[name], final[name]) for name in taken)


def test_by_layers_lower_ones_learn_more_slowly_and_later(tmp_path: Path, task: Task) -> None:
    plan = _train_arm("layerwise", tmp_path, task).plans[-1]
    model = image_model(WIDTH, 5)
    course = plan.recipe.start(model, STEPS)
    rates = [group["initial_lr"] for group in course.optimizer.param_groups]
    assert rates == pytest.approx([p06._OF_ALL * p06._BY_LAYER**depth for depth in range(5)])  # head, 3 layers, patches
    learns = [any(p.requires_grad for p in part.parameters()) for part in (model.head, model.blocks, model.patches)]
    assert learns == [True, False, False]


def test_a_new_model_is_the_same_for_all_arms_of_a_seed(tmp_path: Path, task: Task) -> None:
    scratch = _train_arm("scratch", tmp_path, task)
    assert len(scratch.plans) == 1  # nothing before the labels
    assert _body(scratch.before[0]).keys() == _body(image_model(WIDTH, 5)).keys()
    source = _train_arm("fine_tuned", tmp_path, task)
    first, other = scratch.before[0].state_dict(), source.before[0].state_dict()
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_the_masked_model_holds_the_classifiers_body() -> None:
    shapes = [
        {k: v.shape for k, v in _body(m).items()} for m in (masked_image_model(WIDTH).encoder, image_model(WIDTH, 5))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("is_text", [False, True])
def test_teachers_answer_for_the_labels_that_they_learned(task: Task, is_text: bool) -> None:
    taught = texts.text_task(100) if is_text else task
    labelled = _last_labels(taught, 50)
    scores = taught.teach(*labelled)(labelled[0])
    assert scores.shape == (50, 5)
    assert sum(correct(scores, labelled[1])) > 45  # of 50: both separate so few points in so many dimensions


def test_the_text_model_answers_with_the_mean_over_tokens() -> None:
    asked, model = texts.text_task(5), texts.text_model(WIDTH, 5)
    assert asked.num_classes == 5
    tokens = asked.train[0]
    torch.testing.assert_close(asked.classify(model, tokens), sum(model(tokens).unbind(1)) / 128)


def test_the_finding_names_the_baseline_and_teacher(measured: dict[str, list[Measurement]]) -> None:
    records = [(Cell(6, arm, "quick", 0), m) for arm in ("scratch", "teacher") for m in measured[arm]]
    shares = {
        (arm, num): sum(right) / len(right)
        for arm in ("scratch", "teacher")
        for num in (10, 500)
        if (right := _values(measured[arm], "accuracy", num))
    }
    finding = EXPERIMENT.finding(Results(records))
    assert f"With 10 labels a small Vision Transformer trained from scratch gets {shares['scratch', 10]:.0%}" in finding
    assert f"with 500 it gets {shares['scratch', 500]:.0%}; a support" in finding
    assert f"machine gets {shares['teacher', 10]:.0%} and {shares['teacher', 500]:.0%}." in finding
    without = EXPERIMENT.finding(Results(records[: len(measured["scratch"])]))
    assert without == finding.split(";")[0] + "."
