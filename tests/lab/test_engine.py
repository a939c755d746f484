import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.records import Cell
from transformer_problems.lab.engine import Done, Failed, LocalEngine, Outcome, Progress

AMPLE_S = 60.0  # for whatever ends by itself, on however busy a machine
SHORT_S = 0.2  # for cells that would sleep 600 s
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get the caller's import path."""
    monkeypatch.syspath_prepend(HERE)


def engine_in(folder: Path, timeout_s: float = AMPLE_S) -> LocalEngine:
    from engine_cells import run_cell

    return LocalEngine(run_cell, timeout_s=timeout_s, log=folder / "worker.log")


def cells(*arms: str) -> list[Cell]:
    return [Cell(1, arm, "quick", seed) for seed, arm in enumerate(arms)]


def run(folder: Path, *arms: str, timeout_s: float = AMPLE_S) -> list[Outcome]:
    return list(engine_in(folder, timeout_s).run(cells(*arms)))


def pid_of(outcome: Outcome) -> int:
    assert isinstance(outcome, Done)
    return int(outcome.measurements[0].value)


def is_gone(pid: int) -> bool:
    """Whether the process ends within ten seconds; a zombie has ended, only its parent has not looked yet."""
    for _ in range(1000):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def script(folder: Path, arms: str) -> str:
    """A whole program that runs cells; without the `if __name__ == "__main__"` that multiprocessing would need."""
    return textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(HERE)!r})
        from pathlib import Path
        import engine_cells
        from transformer_problems.core.records import Cell
        from transformer_problems.lab.engine import LocalEngine, Progress
        engine = LocalEngine(engine_cells.run_cell, timeout_s=60, log=Path({str(folder)!r}) / "worker.log")
        for outcome in engine.run([Cell(1, arm, "quick", 0) for arm in {arms!r}.split()]):
            print(int(outcome.fraction) if isinstance(outcome, Progress) else type(outcome).__name__, flush=True)
    """)


def test_cells_run_in_order_in_one_worker_that_is_gone_afterwards(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "work", "report", "work")
    first, quarter, three_quarters, second, third = outcomes
    assert [outcome.cell.seed for outcome in outcomes] == [0, 1, 1, 1, 2]
    assert quarter == Progress(second.cell, 0.25) and three_quarters == Progress(second.cell, 0.75)
    assert pid_of(first) == pid_of(second) == pid_of(third) != os.getpid()
    assert isinstance(first, Done) and first.seconds >= 0
    assert is_gone(pid_of(first))


def test_neither_engine_nor_worker_imports_torch(tmp_path: Path) -> None:
    program = script(tmp_path, "work") + "assert 'torch' not in sys.modules\n"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"Done\n"
    (outcome,) = run(tmp_path, "work")
    assert isinstance(outcome, Done) and outcome.measurements[1].value == 0


def test_no_cells_start_no_worker(tmp_path: Path) -> None:
    assert run(tmp_path) == []
    assert not (tmp_path / "worker.log").exists()


def test_an_exception_fails_its_cell_and_the_worker_goes_on(tmp_path: Path) -> None:
    before, failed, left, local, after = run(tmp_path, "work", "raise", "leave", "unpicklable", "work")
    assert isinstance(failed, Failed)
    assert failed.reason == "ValueError: window_size must be positive; got -1."
    assert "engine_cells.py" in failed.detail and "Traceback" in failed.detail
    assert isinstance(left, Failed) and left.reason == "SystemExit: 7"
    assert isinstance(local, Failed) and local.reason.startswith("Local: of a class")
    assert pid_of(before) == pid_of(after)


@pytest.mark.parametrize(
    ("arm", "reason", "detail"),
    [
        ("exit", "worker died (exit code 3)", "last words"),
        ("kill", "worker died (signal 9, likely out of memory)", ""),
        ("segfault", "worker died (signal 11, SIGSEGV)", "_segfault"),
    ],
)
def test_a_crash_fails_its_cell_and_a_fresh_worker_goes_on(tmp_path: Path, arm: str, reason: str, detail: str) -> None:
    before, failed, after = run(tmp_path, "work", arm, "work")
    assert isinstance(failed, Failed)
    assert failed.reason == reason
    assert detail in failed.detail
    assert pid_of(before) != pid_of(after)
    assert is_gone(pid_of(before)) and is_gone(pid_of(after))


def test_a_time_out_fails_its_cell_and_ends_what_the_cell_started(tmp_path: Path) -> None:
    worker, first, child, second = run(tmp_path, "sleep", "sleep_with_child", timeout_s=1)
    assert isinstance(worker, Progress) and isinstance(child, Progress)
    assert first == Failed(first.cell, "timed out after 1 s")
    assert isinstance(second, Failed)
    assert is_gone(int(worker.fraction)) and is_gone(int(child.fraction))


def test_a_cell_that_never_stops_reporting_times_out_too(tmp_path: Path) -> None:
    *_, last = run(tmp_path, "flood", timeout_s=SHORT_S)
    assert last == Failed(last.cell, "timed out after 0.2 s")


def test_starting_the_worker_does_not_count_as_the_cells_time(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, "work", timeout_s=SHORT_S)
    assert isinstance(outcome, Done)


def test_closing_the_iterator_ends_the_worker(tmp_path: Path) -> None:
    outcomes = engine_in(tmp_path).run(cells("sleep", "work"))
    started = next(iter(outcomes))
    assert isinstance(started, Progress)
    outcomes.close()  # type: ignore[attr-defined]
    assert is_gone(int(started.fraction))


def test_the_worker_ignores_interrupts(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, "interrupt")
    assert isinstance(outcome, Done)


def test_what_cells_print_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chatter, reader = run(tmp_path, "chatter", "read_input")
    assert isinstance(chatter, Done) and isinstance(reader, Done)
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "worker.log").read_text()
    assert "printed\n" in log and "child printed\n" in log and "warned" in log


def test_an_interrupt_of_the_caller_is_raised_and_ends_the_worker(tmp_path: Path) -> None:
    program = script(tmp_path, "sleep")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as caller:
        assert caller.stdout is not None and caller.stderr is not None
        worker = int(caller.stdout.readline())
        caller.send_signal(signal.SIGINT)
        assert caller.stderr.read().strip().endswith(b"KeyboardInterrupt")
    assert is_gone(worker)


@pytest.mark.parametrize("arm", ["sleep", "sleep_with_child"])
def test_no_orphan_outlives_a_killed_caller(tmp_path: Path, arm: str) -> None:
    program = script(tmp_path, arm)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        caller.kill()
    assert is_gone(pid)


def test_the_callers_main_script_runs_once(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text("print('started')\n" + script(tmp_path, "work exit work"))
    result = subprocess.run([sys.executable, str(main)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["started", "Done", "Failed", "Done"]


def test_a_function_that_no_worker_can_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="top level of a module"):
        LocalEngine(lambda cell, progress: [], timeout_s=1, log=tmp_path / "worker.log")
    program = "def run_cell(cell, progress): return []\n" + script(tmp_path, "work").replace(
        "engine_cells.run_", "run_"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ArgumentError: run_cell must be a function that another process can import" in result.stderr


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="timeout_s must be positive; got 0"):
        engine_in(tmp_path, timeout_s=0)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Choose another --out"):
        run(tmp_path / "file", "work")
