import math
import os
import random
import sqlite3
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_problems.core.errors import (
    ArgumentError,
    OutputError,
    StoreCorruptedError,
    StoreError,
    StoreVersionError,
)
from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.lab import store_file
from transformer_problems.lab.store import Store

HERE = Environment("0.1.0", "code-a", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-31")
NEWER = replace(HERE, revision="code-b", date="2025-02-01")
CELL = Cell(9, "alibi", "quick", 0)
OTHER = Cell(9, "learned", "quick", 0)
SPEED = Measurement("latency_s", "s", 0.1 + 0.2, x=64, x_unit="tokens", repeat=3)
LOSS = Measurement("bits_per_byte", "bits", 2.5)


def fill(path: Path, num_cells: int = 40) -> None:
    with Store.open(path) as store:
        for seed in range(num_cells):
            store.finish(replace(CELL, seed=seed), HERE, [SPEED, LOSS] * 5, 1.5)


def read_everything(path: Path) -> object:
    with Store.open(path) as store:
        return store.records(), store.failures(), store.environments(), store.durations(), store.scales()


def assert_refused(path: Path, error: type[StoreError], match: str) -> None:
    """The error is one line that says what to do, and the file is as before."""
    before = path.read_bytes()
    with pytest.raises(error, match=match) as caught:
        read_everything(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) and "Use another folder, or move it away" in str(caught.value)
    assert path.read_bytes() == before


def in_process(program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program that has what this module has in scope."""
    source = Path(__file__).read_text().partition("\ndef read_everything")[0]
    command = [sys.executable, "-c", f"{source}\npath = Path(sys.argv[1])\n{program}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.sqlite"
    with Store.open(path) as store:
        store.finish(CELL, HERE, [SPEED, LOSS], 1.5)
        store.finish(OTHER, HERE, [LOSS, SPEED], 2.5)
    with Store.open(path) as store:
        assert store.measurements() == [(CELL, SPEED), (CELL, LOSS), (OTHER, LOSS), (OTHER, SPEED)]
        assert store.records()[0] == (CELL, HERE, SPEED)
        assert store.finished({"code-a"}) == {CELL, OTHER}
        assert store.durations() == {CELL: 1.5, OTHER: 2.5}
        assert store.environments() == [HERE]
        assert store.failures() == {}
        assert store.scales() == ["quick"]
    assert [file.name for file in path.parent.iterdir()] == ["results.sqlite"]


@settings(max_examples=30)  # each example creates a file
@given(value=st.floats(), x=st.none() | st.floats(allow_nan=False), text=st.text(st.characters(exclude_categories="C")))
def test_every_number_survives(
    tmp_path_factory: pytest.TempPathFactory, value: float, x: float | None, text: str
) -> None:
    with Store.open(tmp_path_factory.mktemp("store") / "results.sqlite") as store:
        store.finish(CELL, HERE, [Measurement(text, text, value, x, text)], 0.0)
        ((_, read),) = store.measurements()
    assert (read.metric, read.unit, read.x_unit, read.x) == (text, text, text, x)
    assert read.value == value or (math.isnan(read.value) and math.isnan(value))


def test_x_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        with pytest.raises(ArgumentError, match="latency_s must be a number; got nan"):
            store.finish(CELL, HERE, [LOSS, replace(SPEED, x=math.nan)], 1.0)
        assert store.finished({"code-a"}) == set()


def test_views_select_problem_and_scale(tmp_path: Path) -> None:
    standard, first = replace(CELL, scale="standard"), replace(CELL, problem=1)
    with Store.open(tmp_path / "results.sqlite") as store:
        store.finish(standard, NEWER, [LOSS], 3.0)
        store.finish(first, HERE, [LOSS], 1.0)
        store.fail(CELL, HERE, "timed out after 60 s")
        assert store.measurements(9) == [(standard, LOSS)]
        assert store.measurements(scale="quick") == [(first, LOSS)]
        assert store.measurements(1, "standard") == []
        assert store.environments(9) == [NEWER] and store.environments(1, "quick") == [HERE]
        assert store.failures(9, "quick") == {CELL: "timed out after 60 s"} and store.failures(1) == {}
        assert store.durations(9, "standard") == {standard: 3.0}
        assert store.scales() == ["standard", "quick"]


def test_a_cell_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        store.fail(CELL, HERE, "first")
        store.fail(CELL, HERE, "second")
        assert store.failures() == {CELL: "second"} and store.finished({"code-a"}) == set()
        store.finish(CELL, HERE, [SPEED, SPEED], 1.0)
        assert store.failures() == {}
        store.finish(CELL, HERE, [LOSS], 1.0)
        assert store.measurements() == [(CELL, LOSS)]


def test_a_reason_may_quote_any_file_name(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        store.fail(CELL, HERE, f"cannot read {os.fsdecode(b'caf' + bytes([0xE9]))}")
        assert store.failures() == {CELL: r"cannot read caf\udce9"}


def test_a_failure_does_not_undo_what_another_run_finished(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        store.finish(CELL, HERE, [LOSS], 1.0)
        store.fail(CELL, HERE, "out of memory")
        assert store.measurements() == [(CELL, LOSS)] and store.failures() == {}


def test_results_of_other_code_are_kept_but_not_taken_for_this_codes(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        store.finish(CELL, HERE, [SPEED], 1.0)
        assert store.finished({"code-b"}) == store.finished(set()) == set()
        store.finish(CELL, NEWER, [LOSS], 2.0)
        assert store.finished({"code-a"}) == store.finished({"code-b"}) == {CELL}
        assert store.measurements() == [(CELL, LOSS)] and store.durations() == {CELL: 2.0}
        assert store.environments() == [NEWER]
        assert store.measurements(fingerprints={"code-a"}) == [(CELL, SPEED)]
        assert store.environments(fingerprints={"code-a", "code-b"}) == [NEWER]
        assert store.measurements(fingerprints=[]) == []
        store.fail(CELL, replace(HERE, revision="code-c"), "crashed")
        assert store.measurements() == [] and store.failures() == {CELL: "crashed"}
        assert store.finished({"code-a"}) == {CELL}


def test_environments_come_once_and_the_last_used_at_the_end(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        store.finish(CELL, NEWER, [], 1.0)
        store.finish(OTHER, HERE, [], 1.0)
        store.finish(replace(CELL, seed=1), NEWER, [], 1.0)
        assert store.environments() == [HERE, NEWER]


def test_the_schema_holds_every_field_of_an_environment(tmp_path: Path) -> None:
    Store.open(tmp_path / "results.sqlite").close()
    connection = sqlite3.connect(tmp_path / "results.sqlite")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(environments)")]
    connection.close()
    assert columns == ["id", *(field.name for field in fields(Environment))]


def test_a_killed_writer_leaves_its_finished_cells_and_nothing_of_the_half_done_one(tmp_path: Path) -> None:
    program = """
store = Store.open(path)
store.finish(CELL, HERE, [SPEED], 1.0)
store._connection.execute("PRAGMA cache_size = 1")  # so that uncommitted pages reach the file
store._connection.create_function("die", 0, lambda: os.kill(os.getpid(), 9))
store._connection.execute(
    "CREATE TEMP TRIGGER deadly AFTER INSERT ON measurements WHEN NEW.repeat = 999 BEGIN SELECT die(); END"
)
store.finish(OTHER, HERE, [replace(SPEED, repeat=repeat) for repeat in range(1000)], 1.0)
"""
    result = in_process(program, tmp_path / "results.sqlite", check=False)
    assert result.returncode == -9, result.stderr
    with Store.open(tmp_path / "results.sqlite") as store:
        assert store.finished({"code-a"}) == {CELL}
        assert store.measurements() == [(CELL, SPEED)]
        store.finish(OTHER, HERE, [LOSS], 1.0)
    assert [file.name for file in tmp_path.iterdir()] == ["results.sqlite"]


def test_several_processes_create_and_write_one_file(tmp_path: Path) -> None:
    program = """
with Store.open(path) as store:
    for seed in range(20):
        store.finish(Cell(1, sys.argv[2], "quick", seed), HERE, [SPEED, LOSS], 1.0)
        store.finish(CELL, HERE, [SPEED, LOSS], 1.0)
"""
    source = Path(__file__).read_text().partition("\ndef read_everything")[0] + "\npath = Path(sys.argv[1])" + program
    path = tmp_path / "results.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", source, str(path), str(arm)]) for arm in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    with Store.open(path) as store:
        assert len(store.finished({"code-a"})) == 4 * 20 + 1
        assert len(store.measurements()) == 2 * (4 * 20 + 1)


def test_a_file_that_stays_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "_BUSY_TIMEOUT_S", 0.01)
    with Store.open(tmp_path / "results.sqlite") as store, Store.open(tmp_path / "results.sqlite") as other:
        with other._transaction(), pytest.raises(StoreError, match=r"locked by another process for .* Run again"):
            store.finish(CELL, HERE, [LOSS], 1.0)
        store.finish(CELL, HERE, [LOSS], 1.0)


@pytest.mark.parametrize("content", [b"not a database, but long enough for a header" * 9, b"short", b"\0" * 4096])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.sqlite"
    path.write_bytes(content)
    assert_refused(path, StoreCorruptedError, "no results file")
    assert list(tmp_path.iterdir()) == [path]


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE cells (id)")
    connection.close()
    assert_refused(path, StoreCorruptedError, "another program's database")


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    fill(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    assert_refused(path, StoreVersionError, "format 7; this version of transformer-problems reads format 1")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "results.sqlite"
    fill(path)
    os.truncate(path, 50 + int(share * path.stat().st_size))
    assert_refused(path, StoreCorruptedError, "damaged")


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").touch()
    fill(tmp_path / "results.sqlite", 1)


@pytest.mark.parametrize("seed", range(3))
def test_overwritten_pages_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "results.sqlite"
    fill(path)
    content = bytearray(path.read_bytes())
    page = 4096 * random.Random(seed).randrange(1, len(content) // 4096)
    content[page : page + 64] = random.Random(seed).randbytes(64)
    path.write_bytes(content)
    assert_refused(path, StoreCorruptedError, "damaged")


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    fill(path)
    original, random_ = path.read_bytes(), random.Random(0)
    for _ in range(60):
        content = bytearray(original)
        content[random_.randrange(len(content))] ^= random_.randrange(1, 256)
        path.write_bytes(content)
        try:
            read_everything(path)
        except StoreError as error:
            assert "\n" not in str(error)
            assert path.read_bytes() == content


def test_damage_is_found_before_a_killed_runs_writes_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    fill(path)
    program = "store = Store.open(path)\nstore.finish(OTHER, HERE, [LOSS], 1.0)\nos.kill(os.getpid(), 9)"
    in_process(program, path, check=False)
    log = path.with_name("results.sqlite-wal")
    with path.open("r+b") as file:
        file.seek(4096)  # the page of the environments, which the last write did not touch
        file.write(random.Random(0).randbytes(64))
    before = log.read_bytes()
    assert before
    assert_refused(path, StoreCorruptedError, "damaged")
    assert log.read_bytes() == before


@pytest.mark.parametrize("garbage", [b"CASCA\xe2E", b'CASCA"E', b"CASCA\nE"])
def test_a_damaged_schema_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "results.sqlite"
    fill(path, 1)
    content = path.read_bytes()
    assert b"CASCADE" in content
    path.write_bytes(content.replace(b"CASCADE", garbage))
    assert_refused(path, StoreCorruptedError, "damaged")


def test_a_missing_table_and_text_that_is_none_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    for damage in ("DROP TABLE measurements", "UPDATE measurements SET unit = CAST(x'ff' AS TEXT)"):
        path.unlink(missing_ok=True)
        fill(path, 1)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute(damage)
        connection.close()
        assert_refused(path, StoreCorruptedError, "damaged")


def test_a_path_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "results.sqlite", tmp_path, Path("/proc/results.sqlite")):
        with pytest.raises(OutputError, match=r"cannot read or write results in .* Use another folder") as caught:
            Store.open(path)
        assert "\n" not in str(caught.value)


def test_a_full_disk_says_so_and_loses_nothing_finished(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    with Store.open(path) as store:
        store.finish(CELL, HERE, [SPEED], 1.0)
        store._connection.execute("PRAGMA max_page_count = 12")
        with pytest.raises(OutputError, match=r"no room left .* what was finished is kept"):
            store.finish(OTHER, HERE, [LOSS] * 10_000, 1.0)
        assert store.measurements() == [(CELL, SPEED)]
        store.finish(OTHER, HERE, [LOSS], 1.0)
    with Store.open(path) as store:
        assert store.measurements() == [(CELL, SPEED), (OTHER, LOSS)]


def test_a_file_size_limit_says_so_and_loses_nothing_finished(tmp_path: Path) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
store = Store.open(path)
store.finish(CELL, HERE, [SPEED], 1.0)
store.finish(OTHER, HERE, [LOSS] * 10_000, 1.0)
"""
    result = in_process(program, tmp_path / "results.sqlite", check=False)
    assert "OutputError: cannot read or write results in" in result.stderr
    with Store.open(tmp_path / "results.sqlite") as store:
        assert store.measurements() == [(CELL, SPEED)]
