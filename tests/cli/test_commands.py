"""The command line as a user meets it: what it prints, what it leaves, and how it refuses."""

import csv
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformer_problems.catalogue import load_catalogue

PROGRAM = [sys.executable, "-m", "transformer_problems"]


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "140", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, env=environment, **options)


def refused(*arguments: str | Path, **options) -> str:
    """The one line that a mistake is answered with."""
    done = run(*arguments, **options)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose measurement of problem 02 was stopped by Ctrl-C, by a request to end, and killed."""
    out = tmp_path_factory.mktemp("measured") / "report"
    kept = 0
    for stop in (signal.SIGINT, signal.SIGTERM):
        process = measuring_until(out, num_cells=kept + 1)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1].startswith("stopped; every finished cell is kept")
        assert "Traceback" not in errors
        assert finished_cells(out) > kept
        kept = finished_cells(out)
    process = measuring_until(out, num_cells=kept + 1)
    process.kill()
    process.communicate(timeout=180)
    assert finished_cells(out) > kept
    return out


@pytest.fixture(scope="module")
def measured(stopped: Path) -> Path:
    """The same folder, measured to its end."""
    kept = finished_cells(stopped)
    done = run("measure", "02", "--out", stopped, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"{kept} of 8 cells are finished already" in done.stdout
    assert "RoPE" in done.stdout
    assert "Warning" not in done.stderr
    assert finished_cells(stopped) == 8
    return stopped


def measuring_until(out: Path, *, num_cells: int) -> subprocess.Popen[str]:
    """A run of `measure 02` that has finished so many cells and is in the middle of the next."""
    process = subprocess.Popen(
        [*PROGRAM, "measure", "02", "--out", str(out), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while finished_cells(out) < num_cells:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


def finished_cells(out: Path) -> int:
    if not (out / "results.sqlite").exists():
        return 0
    connection = sqlite3.connect(out / "results.sqlite")
    try:
        return connection.execute("SELECT count(*) FROM cells WHERE seconds IS NOT NULL").fetchone()[0]
    except sqlite3.OperationalError:  # the tables are being made
        return 0
    finally:
        connection.close()


def test_list_as_json_has_the_promised_form() -> None:
    problems = json.loads(run("list", "--json").stdout)
    assert [p["number"] for p in problems] == list(range(1, 19))
    assert sum(len(p["solutions"]) for p in problems) == 77
    for problem in problems:
        assert set(problem) == {"number", "slug", "title", "category", "solutions"}
        for solution in problem["solutions"]:
            assert set(solution) == {"slug", "name", "status", "verdict"}
            assert solution["status"] in {"measured", "planned"}
            assert (solution["verdict"] is None) == (solution["status"] == "planned")


def test_list_and_show_tell_what_is_planned() -> None:
    listed = run("list").stdout
    assert "Quadratic complexity" in listed
    assert "planned" in listed
    shown = run("show", "quadratic_complexity").stdout
    assert "Performer" in shown
    assert "arXiv:2009.14794" in shown
    assert run("show", "1").stdout == shown == run("show", "01").stdout


@pytest.mark.parametrize("name", ["swin", "Swin", "SWIN", " swin "])
def test_show_explains_a_solution_of_any_spelling(name: str) -> None:
    shown = run("show", name).stdout
    assert shown.startswith("Swin   (attention)\n")
    for pair in load_catalogue().pairs_of(load_catalogue().solution("swin")):
        assert f"\n{pair.problem.number:02d}  {pair.problem.title} ({pair.verdict})\n" in shown
    assert shown.count("choose it when") == 2
    assert "\n  models.swin:SwinTransformer\n" in shown
    assert "arXiv:2103.14030" in shown and "arXiv:2106.13230" in shown


def test_an_example_that_is_shown_can_be_copied_and_run() -> None:
    environment = {"COLUMNS": "40"}
    command = [*PROGRAM, "show", "hierarchical vision transformers"]
    shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True).stdout
    code = textwrap.dedent(shown.partition("\nExample\n")[2].partition("\nReferences\n")[0])
    assert code.strip() == load_catalogue().solution("hierarchical-vit").example
    found: dict[str, torch.Tensor] = {}
    exec(code, found)
    assert found["logits"].shape == (2, 10)


def test_what_is_neither_problem_nor_solution_lists_the_nearest_of_both() -> None:
    assert "unknown problem or solution 'swim'. Nearest: swin" in refused("show", "swim")
    assert "no_positional_awareness" in refused("show", "positional_awarenes")
    assert "See `transformer-problems list`" in refused("show", "xyzzyqq")


def test_measure_leaves_what_it_promises(measured: Path) -> None:
    assert (measured / "results.sqlite").exists()
    assert (measured / "02_no_positional_awareness" / "problem.png").read_bytes().startswith(b"\x89PNG")
    index = (measured / "index.html").read_text()
    assert "planned" in index
    assert "No positional awareness" in index


def test_measuring_again_finds_everything_done(measured: Path) -> None:
    done = run("measure", "02", "--out", measured, "--device", "cpu")
    assert "all 8 cells are finished already" in done.stdout
    assert "going on" not in done.stdout
    assert "seed 0" not in done.stderr  # no cell ran
    assert done.returncode == 0


def test_report_draws_again_from_the_results(measured: Path) -> None:
    picture = measured / "02_no_positional_awareness" / "problem.png"
    before = picture.read_bytes()
    picture.unlink()
    assert run("report", measured).returncode == 0
    assert picture.read_bytes() == before


def test_export_gives_every_measurement(measured: Path) -> None:
    rows = json.loads(run("export", measured, "--format", "json").stdout)
    table = list(csv.DictReader(io.StringIO(run("export", measured, "--format", "csv").stdout)))
    assert len(rows) == len(table) > 1000
    assert {row["problem"] for row in rows} == {2}
    assert all(row["unit"] for row in table)


@pytest.mark.parametrize("command", ["measure", "show"])
def test_an_unknown_problem_lists_the_nearest(command: str) -> None:
    assert "quadratic_complexity" in refused(command, "quadratic_complexty")
    assert "unknown problem '99'" in refused(command, "99")


def test_an_unknown_option_or_value_is_one_line(tmp_path: Path) -> None:
    assert "--scale" in refused("measure", "--scale", "tiny", "--out", tmp_path)
    assert "--seeds" in refused("measure", "--seeds", "0", "--out", tmp_path)
    assert "lst" in refused("lst")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    assert "--device cuda" in refused("measure", "02", "--device", "cuda", "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "Choose another --out" in refused("measure", "02", "--out", tmp_path / "file" / "report")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("room", [4_000, 40_000])
def test_no_room_for_results_is_one_line(tmp_path: Path, room: int) -> None:
    """A limit on the size of files stands for a full disk: writing beyond it fails in the same way."""
    line = refused("measure", "02", "--out", tmp_path / "report", preexec_fn=limit_files_to(room))
    assert "cannot read or write results in" in line
    assert "Use another folder" in line


def test_no_room_for_pictures_loses_no_result(measured: Path, tmp_path: Path) -> None:
    shutil.copy(measured / "results.sqlite", tmp_path)
    before = run("export", tmp_path).stdout
    assert "cannot write" in refused("report", tmp_path, preexec_fn=limit_files_to(30_000))
    assert run("report", tmp_path).returncode == 0
    assert run("export", tmp_path).stdout == before


def limit_files_to(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def damaged_files(folder: Path, measured: Path) -> dict[str, bytes]:
    whole = (measured / "results.sqlite").read_bytes()
    other = folder / "other.sqlite"
    other.write_bytes(whole)
    with sqlite3.connect(other) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    return {
        "truncated": whole[: len(whole) // 2],
        "other version": other.read_bytes(),
        "no results file": b"hello, this is a text file and not a database" * 10,
    }


def test_a_damaged_results_file_is_left_alone(measured: Path, tmp_path: Path) -> None:
    for name, content in damaged_files(tmp_path, measured).items():
        out = tmp_path / name
        out.mkdir()
        (out / "results.sqlite").write_bytes(content)
        for command in (["measure", "02", "--out", out], ["report", out], ["export", out]):
            assert "move it away" in refused(*command), name
        assert (out / "results.sqlite").read_bytes() == content


def test_a_folder_without_results_is_told_what_to_do(tmp_path: Path) -> None:
    assert "Measure first" in refused("report", tmp_path)
    assert not list(tmp_path.iterdir())
