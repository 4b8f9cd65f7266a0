"""The SQLite database of the store: its connections, one writer and a few readers, and its numbered migrations."""

import errno
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.resources import files
from operator import methodcaller
from pathlib import Path

from sandbox.interfaces.store import IndexDamagedError, StoreError
from sandbox.model.errors import SandboxError

_FREE_BYTES_MIN = 64 * 1024
"""Minimum free space to open a database. SQLite needs about half of this space, in addition to the database."""


SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""sqlite3 raises UnicodeDecodeError if SQLite's message quotes a damaged schema that is not UTF-8."""


def is_disk_full(error: sqlite3.Error | UnicodeDecodeError | OSError, database: Path) -> bool:
    """Return whether the error was caused by a full disk."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    if code not in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}:
        return code == sqlite3.SQLITE_FULL
    with suppress(OSError):
        filesystem = os.statvfs(database.parent)
        return filesystem.f_bavail * filesystem.f_frsize < _FREE_BYTES_MIN
    return False


BUSY_TIMEOUT_SECONDS = 5.0
"""How long a transaction waits for a transaction of another process before it fails with StoreError."""

_CACHE_BYTES = 16 * 1024 * 1024
"""Page cache of a connection. A search reads most of a narrow table, which takes about 100 bytes per task."""

IDLE_READERS_MAX = 4
"""Maximum number of idle reader connections."""


class Connections:
    """Connections to one database. Thread-safe.

    Write transactions are serialized; read transactions see a consistent snapshot. SQLite errors in a transaction are
    raised as StoreError.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._writer_lock = threading.Lock()
        self._idle_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = self._connect("ro" if read_only else "rwc")
        if read_only:
            return
        try:
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            self._writer.close()
            raise

    @property
    def writer(self) -> sqlite3.Connection:
        """The writer connection, for setting up the database."""
        return self._writer

    @contextmanager
    def write_transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction. It is committed to disk at the end of the block, or rolled back if the block raises."""
        with _translate_errors(self._path), self._writer_lock, _transaction(self._writer, "IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read_transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that reads one consistent state of the database."""
        with _translate_errors(self._path):
            connection = self._acquire_reader()
            try:
                with _transaction(connection, "DEFERRED"):
                    yield connection
            except BaseException:
                connection.close()
                raise
            self._release_reader(connection)

    def close(self) -> None:
        """Close all connections. The connection of an active reader is closed when its transaction ends."""
        with self._idle_lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
        with self._writer_lock:
            self._writer.close()

    def _acquire_reader(self) -> sqlite3.Connection:
        with self._idle_lock:
            if self._closed:
                raise sqlite3.ProgrammingError("The store is closed")
            if self._idle:
                return self._idle.pop()
        return self._connect("ro")

    def _release_reader(self, connection: sqlite3.Connection) -> None:
        with self._idle_lock:
            if not self._closed and len(self._idle) < IDLE_READERS_MAX:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute(f"PRAGMA cache_size = {-(_CACHE_BYTES // 1024)}")
        except BaseException:  # the statement reads the schema, which may be damaged
            connection.close()
            raise
        # Damaged text in one row must not prevent reading other rows.
        connection.text_factory = methodcaller("decode", "utf-8", "replace")
        return connection


def checkpoint_wal(path: Path) -> bool:
    """Copy a database's write-ahead log into the database; return whether this succeeded."""
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_SECONDS)
        ) as opened:
            opened.execute("PRAGMA user_version").fetchone()
            is_busy, *_ = opened.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except SQLITE_ERRORS:
        return False
    return not is_busy


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SQLITE_ERRORS as error:
        # An error that the sqlite3 module itself detects has no SQLite code.
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_CORRUPT"):
            raise IndexDamagedError(error) from error
        advice = "its disk is full, so free up some space and try again" if is_disk_full(error, path) else "try again"
        raise StoreError(f"The index of tasks is unavailable ({error}); {advice}.") from error


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[sqlite3.Connection]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


_MIGRATION_FILE_NAME = re.compile(r"(\d{4})_\w+\.sql")


class StoreTooNewError(SandboxError):
    """The database was created by a newer version of Sandbox."""

    code = "store_too_new"


class StoreUnusableError(SandboxError):
    """The database cannot be opened or migrated."""

    code = "store_unusable"


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the missing migrations, each in its own transaction, after backing up the database.

    Raises StoreTooNewError, sqlite3.Error, OSError.
    """
    present, steps = read_supported_version(connection), _load_migrations()
    missing = [number for number in sorted(steps) if number > present]
    if present and missing:
        _back_up(connection, path.with_name(f"{path.name}.v{present}"))
    for number in missing:
        _apply_migration(connection, number, steps[number])


def read_supported_version(connection: sqlite3.Connection) -> int:
    """Return the version of the database. Raises StoreTooNewError, sqlite3.Error."""
    [present] = connection.execute("PRAGMA user_version").fetchone()
    newest = max(_load_migrations())
    if present > newest:
        raise StoreTooNewError(
            f"The index has version {present}, but this version of Sandbox supports versions up to {newest}. "
            "Start the version that wrote it, or run 'sandbox admin rebuild' to rebuild the index from the journals."
        )
    return int(present)


def require_current_version(connection: sqlite3.Connection) -> None:
    """Require the current version, for read-only use.

    Raises StoreTooNewError, sqlite3.Error, or StoreUnusableError for an older version.
    """
    present, newest = read_supported_version(connection), max(_load_migrations())
    if present < newest:
        raise StoreUnusableError(
            f"The index has version {present}, but this version of Sandbox requires {newest}; start the server to "
            "upgrade it."
        )


def _back_up(connection: sqlite3.Connection, copy: Path) -> None:
    """Copy the database to a temporary file and rename that file. A leftover from a crash is overwritten."""
    temporary = copy.with_name(f"{copy.name}.new")
    temporary.unlink(missing_ok=True)
    kept = sqlite3.connect(temporary)
    try:
        connection.backup(kept)
    finally:
        kept.close()
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(copy)


def _load_migrations() -> dict[int, str]:
    found = (
        (_MIGRATION_FILE_NAME.fullmatch(file.name), file) for file in (files(__package__) / "migrations").iterdir()
    )
    return {int(name[1]): file.read_text(encoding="utf-8") for name, file in found if name}


def _apply_migration(connection: sqlite3.Connection, number: int, sql: str) -> None:
    try:
        connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
