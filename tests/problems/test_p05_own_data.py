"""Problem 05 on a folder of the user's own: images by class, idx files, recordings."""

import gzip
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from transformer_problems.cli.app import app
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell
from transformer_problems.lab.experiment import Bench, OwnData, ReadsData
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.lab.runner import Run, RunRequest
from transformer_problems.lab.store import Store
from transformer_problems.problems import experiment_of
from transformer_problems.problems.p05_no_local_inductive_bias import experiment as p05
from transformer_problems.problems.p05_no_local_inductive_bias.task import own_task

EXPERIMENT = p05.EXPERIMENT
TINY = p05._Size((4, 8), (4, 8), 8, 2, 2, batch_size=4, seeds=1)


def image_folder(folder: Path, num: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(num):
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
    one = task.known.take(torch.arange(2), torch.device("cpu"))
    assert one.inputs[0].dtype == torch.float32
    if shape is not None:
        assert one.inputs[0].shape[1:] == shape and 0 <= one.inputs[0].min() <= one.inputs[0].max() <= 1
    if make is image_folder:  # all images differ, so a shared one would show
        rows = {tuple(row) for row in task.known.inputs[0].flatten(1)[:, :50].tolist()}
        assert not rows & {tuple(row) for row in task.tested.inputs[0].flatten(1)[:, :50].tolist()}


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
    assert "could not be read and are left out: 1." in EXPERIMENT.notes(results)[0]
    with pytest.raises(ArgumentError, match=f"broken.{suffix}"):
        own_task(OwnData(data, strict=True), lambda share: None)
