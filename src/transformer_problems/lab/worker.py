"""The worker process's side of the local engine: measures the cells it is sent, one after another."""

import faulthandler
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from time import perf_counter
from typing import Any, BinaryIO

from transformer_problems.core.records import Cell, Measurement

CellFunction = Callable[[Cell, Callable[[float], None]], list[Measurement]]
"""Measures one cell and reports its progress from 0 to 1 as it goes."""


def serve() -> None:
    """Answer requests on standard input until it closes; replies go to what was standard output.

    The first request is a pickled `CellFunction`, answered with ("ready",) or ("unusable", why); each further one is
    a cell, answered with any number of ("progress", fraction), then ("done", measurements, seconds) or
    ("failed", reason, traceback). Whatever the cell prints goes to standard error, as its warnings do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    requests, replies = _take_standard_streams()
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_watch, args=(requests, inbox), daemon=True).start()
    try:
        run_cell: CellFunction = pickle.loads(inbox.get())
    except Exception as error:
        _send(replies, ("unusable", _in_one_line(error)))
        os._exit(1)  # at once: an orderly exit would wait for the watcher, which is reading
    _send(replies, ("ready",))
    while True:
        _measure(run_cell, inbox.get(), replies)


def end_with_children(pid: int) -> None:
    """Kill a process that leads its own session, and whatever it has started."""
    with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the second of dead processes
        os.killpg(pid, signal.SIGKILL)


def _take_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Private copies of standard input and output, which then read nothing and write to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _watch(requests: BinaryIO, inbox: SimpleQueue[Any]) -> None:
    """Hand requests on; when there can be no more, the parent is gone, so end even in the middle of a cell."""
    try:
        while True:
            inbox.put(pickle.load(requests))
    finally:
        end_with_children(os.getpid())


def _measure(run_cell: CellFunction, cell: Cell, replies: BinaryIO) -> None:
    start = perf_counter()
    try:
        measurements = list(run_cell(cell, lambda fraction: _send(replies, ("progress", fraction))))
        reply = pickle.dumps(("done", measurements, perf_counter() - start))
    except BaseException as error:  # whatever a cell raises, SystemExit included, is that cell's outcome
        reply = pickle.dumps(("failed", _in_one_line(error), traceback.format_exc()))
    sys.stdout.flush()
    replies.write(reply)
    replies.flush()


def _send(replies: BinaryIO, reply: tuple[object, ...]) -> None:
    pickle.dump(reply, replies)
    replies.flush()


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
