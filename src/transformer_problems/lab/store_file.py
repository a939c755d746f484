"""The results file itself: its schema, its checks on opening, and SQLite's errors in plain words."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

from transformer_problems.core.errors import OutputError, StoreCorruptedError, StoreError, StoreVersionError

_APPLICATION_ID = int.from_bytes(b"TfPr")  # tells our files from any other program's SQLite files
_VERSION = 1  # raise it with any change of the schema
_BUSY_TIMEOUT_S = 60.0  # a transaction takes milliseconds; this is for machines that stall
_SCHEMA = (
    """CREATE TABLE environments (
        id INTEGER PRIMARY KEY,
        version TEXT NOT NULL, revision TEXT NOT NULL, python TEXT NOT NULL, torch TEXT NOT NULL,
        platform TEXT NOT NULL, processor TEXT NOT NULL, device TEXT NOT NULL, threads INTEGER NOT NULL,
        dtype TEXT NOT NULL, date TEXT NOT NULL,
        UNIQUE (version, revision, python, torch, platform, processor, device, threads, dtype, date)
    )""",
    # A finished cell has `seconds`, a failed one `failure`. AUTOINCREMENT: a later row has a larger id, for good.
    """CREATE TABLE cells (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        problem INTEGER NOT NULL, arm TEXT NOT NULL, scale TEXT NOT NULL, seed INTEGER NOT NULL,
        fingerprint TEXT NOT NULL,
        environment INTEGER NOT NULL REFERENCES environments (id),
        seconds REAL, failure TEXT,
        UNIQUE (problem, arm, scale, seed, fingerprint),
        CHECK ((seconds IS NULL) <> (failure IS NULL))
    )""",
    # SQLite has no NaN: a NULL `value` stands for it. A NULL `x` is None.
    """CREATE TABLE measurements (
        id INTEGER PRIMARY KEY,
        cell INTEGER NOT NULL REFERENCES cells (id) ON DELETE CASCADE,
        metric TEXT NOT NULL, unit TEXT NOT NULL, value REAL, x REAL, x_unit TEXT NOT NULL, repeat INTEGER NOT NULL
    )""",
    "CREATE INDEX measurements_of_cell ON measurements (cell)",
)
_WHAT_TO_DO = "It was left as it is. Use another folder, or move it away."


def open_results(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode to a results file, made with its folder where there is none (or an empty one).

    Raises:
        StoreVersionError: If another version of this package wrote it; the file is not changed.
        StoreCorruptedError: If it is damaged or no results file; the file is not changed.
        OutputError: If the file cannot be created, read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_accessible(path, error) from error
    _check_header(path)
    with clear_errors(path):
        if _has_unmerged_writes(path):
            # Closing a writable connection would merge them into the file, so a damaged one is found out before.
            with closing(_connect(path, "ro")) as connection:
                _check(connection, path)
        connection = _connect(path, "rwc")
        try:
            _check(connection, path)
            _create_tables(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, to a file and in a folder that may be another's.

    Raises:
        StoreVersionError, StoreCorruptedError, OutputError: As `open_results`.
    """
    _check_header(path)
    # Whoever writes has a log beside the file. Without one nothing is under way, and only if SQLite is told so does it
    # read without making a log of its own.
    is_still = not _log_of(path).exists()
    with clear_errors(path):
        connection = _connect(path, "ro&immutable=1" if is_still else "ro")
        try:
            _check(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """What SQLite reports, said in terms of the results file."""
    try:
        yield
    except UnicodeDecodeError as error:  # of a message that quotes the damage
        raise _damaged(path, "a text is not UTF-8") from error
    except sqlite3.DatabaseError as error:
        # Python reports text that is not UTF-8 as an OperationalError without a code.
        code = getattr(error, "sqlite_errorcode", None)
        undecodable = code is None and isinstance(error, sqlite3.OperationalError)
        match code and code & 0xFF:  # the low byte is the kind; the rest details it
            case sqlite3.SQLITE_FULL:
                raise OutputError(
                    f"no room left to write {path}; what was finished is kept. "
                    "Free some space and run again: it goes on from there."
                ) from error
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PERM:
                raise _not_accessible(path, error) from error
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise StoreError(
                    f"{path} was locked by another process for {_BUSY_TIMEOUT_S:.0f} s. "
                    "Run again when it is done, or use another folder."
                ) from error
            # Our statements are fixed, so an error in one (SQLITE_ERROR) means that tables or columns are gone.
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
                raise _damaged(path, str(error)) from error
            case _ if undecodable:
                raise _damaged(path, "a text is not UTF-8") from error
        raise


def _check_header(path: Path) -> None:
    """Look at the file's header without SQLite, which would lock and tidy up."""
    try:
        header = b""
        if path.exists():
            with path.open("rb") as file:
                header = file.read(100)
    except OSError as error:
        raise _not_accessible(path, error) from error
    if not header:
        return
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StoreCorruptedError(f"{path} is no results file, or is damaged. {_WHAT_TO_DO}")
    version, application = int.from_bytes(header[60:64]), int.from_bytes(header[68:72])
    if application != _APPLICATION_ID:
        raise StoreCorruptedError(f"{path} is another program's database, or is damaged. {_WHAT_TO_DO}")
    if version != _VERSION:
        raise StoreVersionError(
            f"{path} has results format {version}; this version of transformer-problems reads format {_VERSION}. "
            f"{_WHAT_TO_DO}"
        )


def _has_unmerged_writes(path: Path) -> bool:
    log = _log_of(path)
    return log.exists() and log.stat().st_size > 0


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage == "ok" and connection.execute("PRAGMA foreign_key_check").fetchone():
        damage = "a row refers to one that is missing"
    if damage != "ok":
        raise _damaged(path, damage)


def _create_tables(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")  # of two processes that create the file, the second finds it made
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")


def _damaged(path: Path, how: str) -> StoreCorruptedError:
    return StoreCorruptedError(f"{path} is damaged ({shorten(how, 100)}). {_WHAT_TO_DO}")  # quotes SQL with newlines


def _not_accessible(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"cannot read or write results in {path}: {error}. Use another folder, one with the rights and room for it."
    )
