"""The results file: every finished and failed cell of every run, in SQLite."""

import math
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell, Environment, Measurement, Scale
from transformer_problems.lab.store_file import clear_errors, open_results, open_to_read

_ENVIRONMENT = tuple(field.name for field in fields(Environment))
_KEY = "(problem, arm, scale, seed, fingerprint) = (?, ?, ?, ?, ?)"


class Store:
    """Cells and their measurements, written one transaction a cell, so that a cell is there whole or not at all.

    A cell's key includes its fingerprint, the hash of the code and settings that made it: `environment.revision`.
    Results of other fingerprints stay in the file; where several exist, the views show a cell's newest entry,
    finished or failed. Several processes may use one file at once.

    Args:
        path: Where the file is, for messages.
        connection: An open connection to it, in autocommit mode; use `Store.open`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """Open a results file, or create it with its folder where there is none (or an empty one).

        Args:
            read_only: Need no right to write the file or its folder, and create nothing.

        Raises:
            StoreVersionError: If another version of this package wrote it; the file is not changed.
            StoreCorruptedError: If it is damaged or no results file; the file is not changed.
            OutputError: If the file cannot be created, read or written.
        """
        return cls(path, open_to_read(path) if read_only else open_results(path))

    def close(self) -> None:
        """Close the file; the last to close it merges its write-ahead log."""
        with clear_errors(self.path):
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def finish(self, cell: Cell, environment: Environment, measurements: Sequence[Measurement], seconds: float) -> None:
        """Write down a finished cell, in place of what this fingerprint had for it.

        Raises:
            ArgumentError: If an x is NaN.
            OutputError: If the disk is full or not writable; everything finished before stays.
        """
        rows = [_row(m) for m in measurements]
        with self._transaction():
            self._connection.execute(f"DELETE FROM cells WHERE {_KEY}", (*astuple(cell), environment.revision))
            id_ = self._insert("INSERT", cell, environment, seconds, None)
            self._connection.executemany(
                "INSERT INTO measurements (cell, metric, unit, value, x, x_unit, repeat) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(id_, *row) for row in rows],
            )

    def fail(self, cell: Cell, environment: Environment, reason: str) -> None:
        """Write down why a cell failed, unless this fingerprint has finished it meanwhile.

        Raises:
            OutputError: If the disk is full or not writable; everything finished before stays.
        """
        reason = reason.encode(errors="backslashreplace").decode()  # it may quote a file name that is not UTF-8
        with self._transaction():
            self._connection.execute(
                f"DELETE FROM cells WHERE {_KEY} AND failure IS NOT NULL", (*astuple(cell), environment.revision)
            )
            self._insert("INSERT OR IGNORE", cell, environment, None, reason)

    def finished(self, fingerprints: Collection[str]) -> set[Cell]:
        """Cells that code and settings of one of these fingerprints have finished."""
        rows = self._rows(
            f"SELECT problem, arm, scale, seed FROM cells WHERE failure IS NULL AND {_among(fingerprints)}",
            tuple(fingerprints),
        )
        return {Cell(*row) for row in rows}

    def failures(
        self, problem: int | None = None, scale: Scale | None = None, *, fingerprints: Collection[str] | None = None
    ) -> dict[Cell, str]:
        """Why each cell failed whose newest entry is a failure."""
        rows = self._entries("failure", "failure IS NOT NULL", problem, scale, fingerprints)
        return {Cell(*cell): reason for *cell, reason in rows}

    def durations(
        self, problem: int | None = None, scale: Scale | None = None, *, fingerprints: Collection[str] | None = None
    ) -> dict[Cell, float]:
        """Seconds that each finished cell took."""
        rows = self._entries("seconds", "seconds IS NOT NULL", problem, scale, fingerprints)
        return {Cell(*cell): seconds for *cell, seconds in rows}

    def measurements(
        self, problem: int | None = None, scale: Scale | None = None, *, fingerprints: Collection[str] | None = None
    ) -> list[tuple[Cell, Measurement]]:
        """Every measurement of each cell's newest entry, in the order they were written down.

        Args:
            problem: Only this problem's; None for all.
            scale: Only this scale's; None for all.
            fingerprints: Only what these made, whatever came later; None for any.
        """
        return [(cell, m) for cell, _, m in self.records(problem, scale, fingerprints=fingerprints)]

    def records(
        self, problem: int | None = None, scale: Scale | None = None, *, fingerprints: Collection[str] | None = None
    ) -> list[tuple[Cell, Environment, Measurement]]:
        """As `measurements`, each with the environment it was taken in."""
        environments = dict(self._environments())
        rows = self._entries(
            "environment, metric, unit, value, x, x_unit, repeat",
            "TRUE ORDER BY cells.id, measurements.id",
            problem,
            scale,
            fingerprints,
            source="cells JOIN measurements ON measurements.cell = cells.id",
        )
        return [(Cell(*row[:4]), environments[row[4]], _measurement(*row[5:])) for row in rows]

    def environments(
        self, problem: int | None = None, scale: Scale | None = None, *, fingerprints: Collection[str] | None = None
    ) -> list[Environment]:
        """The environments of the finished cells, each once, the one used last at the end."""
        environments = dict(self._environments())
        rows = self._entries("environment", "seconds IS NOT NULL ORDER BY id DESC", problem, scale, fingerprints)
        newest_first = dict.fromkeys(row[4] for row in rows)
        return [environments[id_] for id_ in reversed(newest_first)]

    def latest_scale(self, problem: int) -> Scale | None:
        """The scale at which the problem's newest finished cell was measured."""
        rows = self._rows(
            "SELECT scale FROM cells WHERE problem = ? AND seconds IS NOT NULL ORDER BY id DESC LIMIT 1", (problem,)
        )
        return rows[0][0] if rows else None

    def scales(self) -> list[Scale]:
        """Scales that have finished cells, in the order they were first measured."""
        rows = self._rows("SELECT scale FROM cells WHERE seconds IS NOT NULL GROUP BY scale ORDER BY min(id)")
        return [row[0] for row in rows]

    def _insert(
        self, insert: str, cell: Cell, environment: Environment, seconds: float | None, failure: str | None
    ) -> int | None:
        self._connection.execute(
            f"INSERT OR IGNORE INTO environments ({', '.join(_ENVIRONMENT)}) VALUES ({_marks(_ENVIRONMENT)})",
            astuple(environment),
        )
        where = " AND ".join(f"{name} = ?" for name in _ENVIRONMENT)
        return self._connection.execute(
            f"{insert} INTO cells (problem, arm, scale, seed, fingerprint, environment, seconds, failure) "
            f"VALUES (?, ?, ?, ?, ?, (SELECT id FROM environments WHERE {where}), ?, ?)",
            (*astuple(cell), environment.revision, *astuple(environment), seconds, failure),
        ).lastrowid

    def _environments(self) -> Iterator[tuple[int, Environment]]:
        for id_, *values in self._rows(f"SELECT id, {', '.join(_ENVIRONMENT)} FROM environments"):
            yield id_, Environment(*values)

    def _entries(
        self,
        columns: str,
        where: str,
        problem: int | None,
        scale: Scale | None,
        fingerprints: Collection[str] | None,
        source: str = "cells",
    ) -> list[tuple[Any, ...]]:
        """Rows of (problem, arm, scale, seed, *columns) of each cell's newest entry."""
        among = "TRUE" if fingerprints is None else _among(fingerprints)
        return self._rows(
            f"SELECT problem, arm, scale, seed, {columns} FROM {source} WHERE cells.id IN "
            f"(SELECT max(id) FROM cells WHERE {among} GROUP BY problem, arm, scale, seed) "
            f"AND coalesce(problem = ?, TRUE) AND coalesce(scale = ?, TRUE) AND {where}",
            (*(fingerprints or ()), problem, scale),
        )

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with clear_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with clear_errors(self.path), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield


def _among(fingerprints: Collection[str]) -> str:
    return f"fingerprint IN ({_marks(fingerprints)})"


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


def _row(m: Measurement) -> tuple[str, str, float | None, float | None, str, int]:
    if m.x is not None and math.isnan(m.x):
        raise ArgumentError(
            f"x of a measurement of {m.metric} must be a number; got nan. Use None where nothing varied."
        )
    value = float(m.value)
    return m.metric, m.unit, None if math.isnan(value) else value, m.x, m.x_unit, m.repeat


def _measurement(metric: str, unit: str, value: float | None, x: float | None, x_unit: str, repeat: int) -> Measurement:
    return Measurement(metric, unit, math.nan if value is None else value, x, x_unit, repeat)
