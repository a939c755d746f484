"""Problem 05 on a folder of the user's own: images by class, idx files, recordings."""

import gzip
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from transformer_problems.catalogue import load_catalogue
from transformer_problems.cli.app import app
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.lab.experiment import Bench, OwnData, ReadsData
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.runner import Run, RunRequest
from transformer_problems.lab.store import Store
from transformer_problems.lab.summary import summarise
from transformer_problems.problems import experiment_of
from transformer_problems.problems.p05_no_local_inductive_bias import experiment as p05
from transformer_problems.problems.p05_no_local_inductive_bias import task as task_module
from transformer_problems.problems.p05_no_local_inductive_bias.task import Examples, own_task
from transformer_problems.report import write_report
from transformer_problems.report.formatting import format_verdict
from transformer_problems.report.story import leading_rows, pairs_best_first, status_of

EXPERIMENT = p05.EXPERIMENT
HERE = Environment("0.1.0", "code", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 1, "float32", "2025-01-31")
TINY = p05._Size((4, 8), (4, 8), 8, 2, 2, batch_size=4, seeds=1)


def image_folder(folder: Path, num: int = 10, num_dogs: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    for name, num_of_class in (("cat", num), ("dog", num if num_dogs is None else num_dogs)):
        (folder / name).mkdir(parents=True)
        for i in range(num_of_class):
            Image.fromarray(rng.integers(0, 255, (20, 28, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def wav_folder(folder: Path, num: int = 6) -> Path:
    for pitch, name in ((300, "low"), (900, "high")):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            tone = np.sin(np.arange(2000 + 100 * i) * pitch * 2 * np.pi / 8000) * 20_000
            with wave.open(str(folder / name / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(tone.astype("<i2").tobytes())
    return folder


def idx_folder(folder: Path) -> Path:
    folder.mkdir()
    for prefix, num in (("train", 12), ("t10k", 6)):
        pixels = np.arange(num * 28 * 28, dtype=np.int64).astype(np.uint8)
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (num, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        labels = b"\0\0\x08\x01" + num.to_bytes(4, "big") + bytes(i % 3 for i in range(num))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def bench(arm: str, folder: Path, data: Path) -> Bench:
    models = ModelCache(folder / "cache", "code")
    return Bench(Cell(5, arm, "quick", 0), torch.device("cpu"), models, lambda share: None, OwnData(data))


@pytest.mark.parametrize(
    ("make", "shape", "classes", "sizes"),
    [(image_folder, (3, 32, 32), 2, (16, 4)), (idx_folder, (1, 32, 32), 3, (12, 6)), (wav_folder, None, 2, (10, 2))],
)
def test_a_folder_becomes_a_task_without_overlap(make, shape, classes: int, sizes: tuple[int, int], tmp_path) -> None:
    shares: list[float] = []
    task = own_task(OwnData(make(tmp_path / "data")), shares.append)
    assert (len(task.known), len(task.tested)) == sizes
    assert task.form.num_classes == classes and shares[-1] == 1
    (inputs, *_) = task.known.select(torch.arange(2)).numbers()
    assert inputs.dtype == torch.float32
    if shape is not None:
        assert inputs.shape[1:] == shape and 0 <= inputs.min() <= inputs.max() <= 1
    if make is image_folder:  # all images differ, so a shared one would show
        rows = {tuple(row) for row in task.known.inputs[0].flatten(1)[:, :50].tolist()}
        assert not rows & {tuple(row) for row in task.tested.inputs[0].flatten(1)[:, :50].tolist()}


@pytest.mark.parametrize(("num", "num_dogs", "held_out"), [(10, 3, [2, 1]), (40, 2, [8, 1]), (13, 13, [3, 3])])
def test_a_fifth_of_each_class_is_held_out(num: int, num_dogs: int, held_out: list[int], tmp_path: Path) -> None:
    own = OwnData(image_folder(tmp_path / "data", num, num_dogs))
    first, again = (own_task(own, lambda share: None) for _ in range(2))
    assert first.tested.classes.bincount().tolist() == held_out
    assert first.known.classes.bincount().tolist() == [num - held_out[0], num_dogs - held_out[1]]
    assert torch.equal(first.tested.inputs[0], again.tested.inputs[0])


@pytest.mark.parametrize("arm", ["vit", "cnn", "swin", "pyramid", "encoder", "conformer"])
def test_every_arm_measures_its_kind_of_data(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    is_heard = arm in ("encoder", "conformer")
    data = (wav_folder if is_heard else image_folder)(tmp_path / "data")
    found = list(EXPERIMENT.measure(bench(arm, tmp_path, data)))
    xs = {m.x for m in found if m.metric == "accuracy"}
    assert xs == {4.0, 8.0, 10.0 if is_heard else 16.0}
    results = Results([(Cell(5, arm, "quick", 0), m) for m in found])
    assert "own data" in EXPERIMENT.notes(results)[0] if arm in ("vit", "encoder") else True


@pytest.mark.parametrize(("make", "arm"), [(image_folder, "vit"), (wav_folder, "encoder")])
def test_the_finding_names_the_fewest_and_the_most_there_are(make, arm: str, tmp_path: Path, monkeypatch) -> None:
    """With fewer than the table's 20 examples too, and where all there are is one number."""
    kind = "images" if make is image_folder else "recordings"
    name = "Vision Transformer" if make is image_folder else "encoder"
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    for folder, num, fewest in (("more", 6, 4), ("few", 2, 2)):
        found = list(EXPERIMENT.measure(bench(arm, tmp_path, make(tmp_path / folder, num))))
        results = Results([(Cell(5, arm, "quick", 0), m) for m in found])
        most = 10 if num == 6 else 2
        few, all_ = (np.mean([m.value for m in found if (m.metric, m.x) == ("accuracy", x)]) for x in (fewest, most))
        told = f"With {fewest} examples a plain {name} gets {few:.0%} of {kind} right"
        told += f", with {most} it gets {all_:.0%}" if most > fewest else ""
        finding = EXPERIMENT.finding(results)
        assert finding.startswith(f"{told};" if arm == "vit" else f"{told}.")
        assert ("its first layer then looks across" in finding) == (arm == "vit")
        assert f"at 20 training examples, and here are {most}." in EXPERIMENT.notes(results)[0]


@pytest.mark.parametrize(("make", "arm"), [(image_folder, "vit"), (wav_folder, "encoder")])
def test_the_page_says_which_arms_the_data_is_not_for(make, arm: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    found = list(EXPERIMENT.measure(bench(arm, tmp_path, make(tmp_path / "data"))))
    records = [(Cell(5, arm, "quick", 0), m) for m in found]
    catalogue = load_catalogue()
    summary = summarise(EXPERIMENT, catalogue, records, {}, "quick", HERE)
    words = {row.arm.slug: format_verdict(row) for row in summary.rows}
    if arm == "vit":
        assert words == {"vit": "–"} | dict.fromkeys(("cnn", "swin", "pyramid"), "not measured yet") | dict.fromkeys(
            ("encoder", "conformer"), "for recordings only"
        )
        assert summary.chart == EXPERIMENT.chart
    else:
        assert words == {"encoder": "–", "conformer": "not measured yet"} | dict.fromkeys(
            ("vit", "cnn", "swin", "pyramid"), "for images only"
        )
        assert summary.chart.problem_title == "Plain encoder, speech"
    assert summary.rows[0].arm.slug == arm  # the baseline of what was measured
    assert summary.finding == EXPERIMENT.finding(Results(records))
    rows = leading_rows(summary)
    told = {pair.solution.slug: status_of(pair, rows) for pair in catalogue.pairs(catalogue.problem("05"))}
    assert told["swin"] == words["swin"] and told["conformer"] == words["conformer"]
    assert {word for _, word, _ in pairs_best_first(catalogue, catalogue.problem("05"), rows)} == set(told.values())
    write_report(tmp_path / "out", catalogue, {5: summary}, {5: records})
    page = (tmp_path / "out" / catalogue.problem("05").folder / "index.html").read_text()
    assert words["swin"] in page and words["conformer"] in page


def test_built_in_results_ask_every_arm() -> None:
    records = [(Cell(5, "vit", "quick", 0), Measurement("accuracy", "1", 1.0, 20.0))]
    assert EXPERIMENT.not_asked(Results(records)) == {} == EXPERIMENT.not_asked(Results([]))


def test_only_the_arms_of_that_kind_are_planned_and_the_data_is_part_of_the_key(tmp_path: Path) -> None:
    def run(data: Path | None) -> Run:
        request = RunRequest(
            {5: "p05_no_local_inductive_bias"},
            experiment_of,
            "quick",
            "cpu",
            tmp_path,
            seeds=1,
            data=data and OwnData(data),
        )
        with Store.open(request.store_path) as store:
            return Run(request, store)

    assert isinstance(EXPERIMENT, ReadsData)
    sounds, images = wav_folder(tmp_path / "wav"), image_folder(tmp_path / "images")
    assert {cell.arm for cell in run(sounds).planned} == {"encoder", "conformer"}
    assert {cell.arm for cell in run(images).planned} == {"vit", "cnn", "swin", "pyramid"}
    keys = [run(data).fingerprints[5] for data in (None, sounds, images)]
    (images / "cat" / "0.png").unlink()
    assert len({*keys, run(images).fingerprints[5]}) == 4


def test_what_cannot_be_read_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    empty, one, text = (tmp_path / name for name in ("empty", "one", "text"))
    empty.mkdir()
    image_folder(one)
    for file in (one / "dog").iterdir():
        file.unlink()
    (one / "dog").rmdir()
    (text / "cat").mkdir(parents=True)
    (text / "cat" / "a.png").write_text("no image")
    for problems, data, words in (
        (["05"], empty, "data must hold a sub-folder of .png"),
        (["05"], tmp_path / "missing", "holds none"),
        (["01"], image_folder(tmp_path / "images"), "problem 01 reads no data of its user's"),
    ):
        done = CliRunner().invoke(app, ["measure", *problems, "--data", str(data), "--out", str(tmp_path / "out")])
        assert done.exit_code != 0
        assert isinstance(done.exception, ArgumentError) and words in str(done.exception)
    for data, words in ((one, "two classes at least"), (text, "has none, of 1 unreadable")):
        with pytest.raises(ArgumentError, match=words):
            own_task(OwnData(data), lambda share: None)


def test_too_few_files_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    one, broken = image_folder(tmp_path / "one", 5, 1), image_folder(tmp_path / "broken", 5, 2)
    needed = r"every class must have 2 readable files at least, .* test; .*dog has 1. Add 1 or remove the class"
    done = CliRunner().invoke(app, ["measure", "05", "--data", str(one), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ArgumentError)
    assert re.search(needed, str(done.exception))
    (broken / "dog" / "0.png").write_text("no image")
    with pytest.warns(UserWarning, match="^1 unreadable"), pytest.raises(ArgumentError, match=needed):
        own_task(OwnData(broken), lambda share: None)


def test_what_is_left_out_is_told_when_planned_or_refused(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data")
    (data / "dog" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"^1 files or folders of .* left out .* first .*notes.txt"):
        assert EXPERIMENT.arms_for(OwnData(data)) == {"vit", "cnn", "swin", "pyramid"}
    with pytest.raises(ArgumentError, match=r"notes.txt \(of another type\) is among 1 that would be left out"):
        EXPERIMENT.arms_for(OwnData(data, strict=True))


def test_if_every_arm_fails_the_run_says_so_and_exits_with_1(tmp_path: Path) -> None:
    data, out = image_folder(tmp_path / "data", 3), tmp_path / "out"
    for file in (data / "dog").iterdir():
        file.write_text("no image")
    (data / "cat" / "notes.txt").write_text("no image")
    done = CliRunner().invoke(app, ["measure", "05", "--data", str(data), "--out", str(out), "--device", "cpu"])
    assert done.exit_code == 1
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "notes.txt" in notes[0]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "transformer-problems: not measured: problem 05, every arm failed: ArgumentError: every class"
    )
    assert last.endswith(f"Replace its files. More is in {out / 'worker.log'}.")
    assert (out / "index.html").exists()  # what there is, is written all the same


@pytest.mark.filterwarnings("ignore:2 recordings")
def test_of_long_recordings_the_beginning_is_taken_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    monkeypatch.setattr(task_module, "OWN_SECONDS", 0.30)  # 2,400 samples; each class has one of 2,500
    data = wav_folder(tmp_path / "data")
    results = Results(
        [(Cell(5, "encoder", "quick", 0), m) for m in EXPERIMENT.measure(bench("encoder", tmp_path, data))]
    )
    assert "Recordings of which only the first 5 s are taken: 2." in EXPERIMENT.notes(results)[0]
    with pytest.raises(ArgumentError, match=r"recordings must last 0.3 s at most .*5.wav lasts 0.3 s"):
        own_task(OwnData(data, strict=True), lambda share: None)


@pytest.mark.parametrize("num_frames", [29, 100, 500, 3_000, 5_000])
def test_sounds_are_tested_in_batches_of_bounded_size(num_frames: int) -> None:
    tested = Examples(
        (torch.zeros(700, num_frames, 1), torch.ones(700, num_frames, dtype=torch.bool)), torch.zeros(700)
    )
    sizes: list[int] = []

    class Watch(nn.Module):
        def forward(self, features: torch.Tensor, *, key_mask: torch.Tensor) -> torch.Tensor:
            sizes.append(len(features))
            return torch.zeros(len(features), 2)

    assert p05.correct(Watch(), tested, torch.device("cpu")) == [1.0] * 700
    assert sum(sizes) == 700
    assert max(sizes) == 1 or (max(sizes) <= 300 and max(sizes) * num_frames**2 <= p05._SCORES_AT_ONCE)
    assert num_frames > 100 or sizes == [300, 300, 100]


@pytest.mark.parametrize(("make", "suffix"), [(image_folder, "png"), (wav_folder, "wav")])
@pytest.mark.filterwarnings("ignore:1 unreadable")
def test_unreadable_files_are_told_on_the_page_or_refused(make, suffix: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(p05._SIZES, "quick", TINY)
    data = make(tmp_path / "data")
    broken = next(data.iterdir()) / f"broken.{suffix}"
    broken.write_text("neither image nor sound")
    arm = "vit" if make is image_folder else "encoder"
    found = list(EXPERIMENT.measure(bench(arm, tmp_path, data)))
    results = Results([(Cell(5, arm, "quick", 0), m) for m in found])
    assert "left out, as unreadable or of another type: 1." in EXPERIMENT.notes(results)[0]
    with pytest.raises(ArgumentError, match=f"broken.{suffix}"):
        own_task(OwnData(data, strict=True), lambda share: None)
