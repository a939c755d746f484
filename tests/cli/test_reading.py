"""What the commands that only read do: results of several codes, diverged runs, full disks, narrow screens."""

import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from transformer_problems.catalogue import load_catalogue
from transformer_problems.cli.tables import measured_table, named_problem
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell, Environment, Measurement, Scale
from transformer_problems.core.summaries import ProblemSummary
from transformer_problems.lab.archive import load_archive
from transformer_problems.lab.store import Store
from transformer_problems.problems import experiment_of

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
HERE = Environment("0.1.0", "code-b", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-31")
OLD = Environment("0.1.0", "code-a", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-30")
ARMS = [arm.slug for arm in experiment_of(2).arms]


@pytest.fixture(scope="module")
def generate_images() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_images", ROOT / "generate_images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(generate_images: ModuleType) -> dict[int, ProblemSummary]:
    """The published results, with real labels and numbers."""
    return generate_images.committed_summaries(load_catalogue())


def program(
    *arguments: object, columns: int = 80, stdout: object = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from transformer_problems.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


def store_results(folder: Path, scale: Scale = "quick", *, diverged: str = "", old_value: float = 0.125) -> None:
    """Problem 02 as two codes measured it: all arms by the old one, all but the last by the new one."""
    with Store.open(folder / "results.sqlite") as store:
        for environment, arms, value in ((OLD, ARMS, old_value), (HERE, ARMS[:-1], 0.75)):
            for arm in arms:
                lost = math.nan if arm == diverged else value
                measured = [Measurement("order_accuracy", "1", lost, 40.0, "steps", r) for r in (0, 1)]
                measured += [Measurement("equivariance_error", "1", 1e-7), Measurement("step_s", "s", 0.01)]
                store.finish(Cell(2, arm, scale, 0), environment, measured, 1.0)


def test_records_hold_what_the_newest_code_measured_and_nothing_else(tmp_path: Path) -> None:
    store_results(tmp_path)
    assert program("report", tmp_path).returncode == 0
    with (tmp_path / "02_no_positional_awareness" / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == set(ARMS[:-1])
    assert {row["value"] for row in rows if row["metric"] == "order_accuracy"} == {"0.75"}


def test_published_records_hold_what_the_newest_code_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate_images: ModuleType
) -> None:
    monkeypatch.setattr(generate_images, "RESULTS", tmp_path / "results")
    store_results(tmp_path, "standard")
    generate_images.take_over(tmp_path, load_catalogue())
    archive = load_archive(tmp_path / "results", "02_no_positional_awareness")
    assert archive is not None
    assert archive.environment == HERE
    assert {cell.arm for cell, _ in archive.records} == set(ARMS[:-1])


def test_a_diverged_run_does_not_keep_the_report_from_being_drawn(tmp_path: Path) -> None:
    store_results(tmp_path, diverged="rope")
    done = program("report", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "02_no_positional_awareness" / "index.html").read_text()
    assert "its order_accuracy diverged in 1 of 1 seed" in page


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["list", "show", "export"])
def test_a_full_disk_behind_a_redirection_is_one_line(command: str, tmp_path: Path) -> None:
    store_results(tmp_path)
    arguments = {"list": [], "show": ["01"], "export": [tmp_path]}[command]
    with FULL.open("w") as full:
        done = program(command, *arguments, stdout=full)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_a_page_is_one_line(tmp_path: Path) -> None:
    store_results(tmp_path)
    (tmp_path / "index.html").symlink_to(FULL)
    done = program("report", tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "--out" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_reading_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    store_results(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert program("export", tmp_path).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with Store.open(tmp_path / "results.sqlite", read_only=True) as store, pytest.raises(Exception, match="readonly"):
        store.fail(Cell(2, "rope", "quick", 0), HERE, "a reason")


def test_remedies_name_no_option_that_the_command_lacks(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").write_text("no database" * 20)
    for command in ("report", "export"):
        done = program(command, tmp_path)
        assert done.returncode == 2
        assert "move it away" in done.stderr
        assert "--out" not in done.stderr


@pytest.mark.parametrize("arguments", [("measure", "02", "--out", ""), ("report", ""), ("export", "")])
def test_an_empty_folder_name_is_refused(arguments: tuple[str, ...]) -> None:
    done = program(*arguments)
    assert done.returncode == 2
    assert "the name of the folder is empty" in done.stderr


def test_mistakes_are_told_without_the_machinery_behind(tmp_path: Path) -> None:
    assert "Value error" not in program("measure", "--scale", "quik", "--out", tmp_path).stderr
    assert "Numbers go from 01 to 18" in program("show", "99").stderr


def test_a_pair_with_a_criterion_of_its_own_shows_it() -> None:
    assert program("show", "01").stdout.count("what decides here: Peak allocated bytes") == 1


@pytest.mark.parametrize("width", [36, 60, 80, 100, 140, 240])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_no_number_verdict_or_word_of_a_heading_is_cut(
    width: int,
    number: int,
    committed: dict[int, ProblemSummary],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = committed[number]
    monkeypatch.setenv("COLUMNS", str(width))
    measured_table(load_catalogue().problem(number), summary)
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= Console().width
    words = [row.verdict.word for row in summary.rows if row.verdict]
    assert text.count("inconclusive") == words.count("inconclusive")
    assert text.split().count("helps") == words.count("helps")


def test_unknown_numbers_are_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="Numbers go from 01 to 18"):
        named_problem(load_catalogue(), "0")
    assert named_problem(load_catalogue(), "1").number == 1


@pytest.mark.parametrize("arguments", [("show", 3), ("list",), ("list", "--json"), ("--version",)])
def test_a_reader_that_has_seen_enough_is_no_failure(arguments: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head -1` does, before everything is printed
    done = program(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
