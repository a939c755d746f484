"""What the engine's tests run in worker processes: the cell's arm says how to behave. Imports no torch."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

from transformer_problems.core.records import Cell, Measurement


def run_cell(cell: Cell, progress: Callable[[float], None]) -> list[Measurement]:
    BEHAVIOURS[cell.arm](progress)
    return [Measurement("pid", "1", os.getpid()), Measurement("modules", "1", float("torch" in sys.modules))]


def _report(progress: Callable[[float], None]) -> None:
    progress(0.25)
    progress(0.75)


def _raise(progress: Callable[[float], None]) -> None:
    raise ValueError("window_size must be positive;\ngot -1.")


def _leave(progress: Callable[[float], None]) -> None:
    raise SystemExit(7)


def _exit(progress: Callable[[float], None]) -> None:
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def _kill(progress: Callable[[float], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(progress: Callable[[float], None]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _sleep(progress: Callable[[float], None]) -> None:
    progress(float(os.getpid()))  # not a fraction, but the only word a sleeping cell can get out
    time.sleep(600)


def _flood(progress: Callable[[float], None]) -> None:
    while True:
        progress(0.5)


def _sleep_with_child(progress: Callable[[float], None]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    progress(float(child.pid))
    time.sleep(600)


def _interrupt(progress: Callable[[float], None]) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _chatter(progress: Callable[[float], None]) -> None:
    print("printed")
    warnings.warn("warned", stacklevel=1)
    subprocess.run([sys.executable, "-c", "print('child printed')"], check=True)


def _read_input(progress: Callable[[float], None]) -> None:
    assert sys.stdin.read() == ""


def _unpicklable(progress: Callable[[float], None]) -> None:
    raise type("Local", (Exception,), {})("of a class that no other process knows")


BEHAVIOURS = {
    "work": lambda progress: None,
    "report": _report,
    "raise": _raise,
    "leave": _leave,
    "exit": _exit,
    "kill": _kill,
    "segfault": _segfault,
    "sleep": _sleep,
    "flood": _flood,
    "sleep_with_child": _sleep_with_child,
    "interrupt": _interrupt,
    "chatter": _chatter,
    "read_input": _read_input,
    "unpicklable": _unpicklable,
}
