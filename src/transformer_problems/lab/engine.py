"""The local engine: cells run in a worker process that may crash or hang without taking the run down."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.worker import CellFunction, end_with_children

_START_LIMIT_S = 300.0  # importing torch from a cold network disk can take minutes
_EXIT_LIMIT_S = 5.0
_DETAIL_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Progress:
    """A cell under way; `fraction` runs from 0 to 1."""

    cell: Cell
    fraction: float


@dataclass(frozen=True, slots=True)
class Done:
    """A finished cell."""

    cell: Cell
    measurements: list[Measurement]
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A cell that raised, hung or took its process down.

    Args:
        reason: One line, e.g. "timed out after 60 s".
        detail: The traceback, or the last that the worker wrote to its log.
    """

    cell: Cell
    reason: str
    detail: str = ""


Outcome = Progress | Done | Failed


class LocalEngine:
    """Runs cells one after another in one worker process, and starts a fresh one after a crash or a time-out.

    The worker is reused, so torch is imported once. It is a plain `python -c` process, so it never imports the
    caller's main script; it has a session of its own, so Ctrl-C reaches the caller alone; it ends with the caller,
    however that ends. What it and the libraries in it print goes to the log. POSIX only.

    Args:
        run_cell: What the worker calls; picklable, made of functions that live in importable modules.
        timeout_s: Seconds that one cell may take.
        log: File that the worker's output is appended to.

    Raises:
        ArgumentError: If `run_cell` cannot be pickled or `timeout_s` is not positive.
    """

    def __init__(self, run_cell: CellFunction, *, timeout_s: float, log: Path) -> None:
        require_positive(timeout_s=timeout_s)
        self.timeout_s, self.log = timeout_s, log
        try:
            self._run_cell = pickle.dumps(run_cell)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _unusable(str(error)) from error

    def run(self, cells: Iterable[Cell]) -> Iterator[Outcome]:
        """Run the cells in order; each gives any number of `Progress`, then one `Done` or `Failed`.

        The worker is gone when the iterator ends, is closed, or is interrupted.

        Raises:
            ArgumentError: If the worker cannot import `run_cell`.
            OutputError: If the log cannot be written.
        """
        worker: _Worker | None = None
        try:
            for cell in cells:
                worker = worker or _Worker(self._run_cell, self.log)
                try:
                    yield from self._run_one(cell, worker)
                except _WorkerLostError as loss:
                    failure = Failed(cell, str(loss), worker.log_tail())
                    worker.close()
                    worker = None
                    yield failure
        finally:
            if worker:
                worker.close()

    def _run_one(self, cell: Cell, worker: "_Worker") -> Iterator[Outcome]:
        worker.begin(cell)
        deadline, timed_out = monotonic() + self.timeout_s, f"timed out after {self.timeout_s:g} s"
        while True:
            match worker.receive(deadline, timed_out):
                case "progress", fraction:
                    if monotonic() > deadline:  # replies that are there already are received even then
                        raise _WorkerLostError(timed_out)
                    yield Progress(cell, fraction)
                case "done", measurements, seconds:
                    yield Done(cell, measurements, seconds)
                    return
                case "failed", reason, detail:
                    yield Failed(cell, reason, detail)
                    return


class _WorkerLostError(Exception):
    """The worker died or was given up; the message is the reason to report."""


class _Worker:
    """One worker process and the two pipes to it."""

    def __init__(self, run_cell: bytes, log: Path) -> None:
        self._run_cell = run_cell
        self._is_ready = False
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("a+b", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write the worker's log {log}: {error}. Choose another --out.") from error
        self._log_start = self._log_size()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin(self, cell: Cell) -> None:
        """Send a cell, to a worker that has loaded what it is to run."""
        if not self._is_ready:
            self._send(self._run_cell)
            match self.receive(monotonic() + _START_LIMIT_S, f"worker did not start within {_START_LIMIT_S:g} s"):
                case "unusable", why:
                    raise _unusable(why)
            self._is_ready = True
        self._log_start = self._log_size()
        self._send(cell)

    def receive(self, deadline: float, on_timeout: str) -> Any:
        """The next reply.

        Raises:
            _WorkerLostError: If the worker dies, or the deadline passes.
        """
        try:
            reply = self._replies.get(timeout=max(0.0, deadline - monotonic()))
        except Empty:
            raise _WorkerLostError(on_timeout) from None
        if reply is None:
            raise _WorkerLostError(self._cause_of_death())
        return reply

    def close(self) -> None:
        """End the process and whatever it has started."""
        end_with_children(self._process.pid)
        self._process.wait()
        self._reader.join(_EXIT_LIMIT_S)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a request that the worker did not live to read
            self._process.stdin.close()
        self._log.close()

    def log_tail(self) -> str:
        """The last that was logged since the present cell began."""
        self._log.seek(max(self._log_start, self._log_size() - _DETAIL_BYTES))
        return self._log.read().decode(errors="replace")

    def _log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def _send(self, request: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the worker is dead, which `receive` finds out and reports
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            while True:
                try:
                    self._replies.put(pickle.load(stdout))
                except (EOFError, pickle.UnpicklingError):  # closed, or died in the middle of a reply
                    self._replies.put(None)
                    return

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "worker closed its connection"
        if code >= 0:
            return f"worker died (exit code {code})"
        likely = "likely out of memory" if -code == signal.SIGKILL else signal.Signals(-code).name
        return f"worker died (signal {-code}, {likely})"


_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from transformer_problems.lab.worker import serve; serve()"


def _unusable(why: str) -> ArgumentError:
    return ArgumentError(
        f"run_cell must be a function that another process can import; got: {why}. "
        "Define it at the top level of a module, not in a script, a function or an interactive session."
    )
