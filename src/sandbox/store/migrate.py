"""Applies the numbered migrations in `migrations/` to the database, and checks its version."""

import os
import re
import sqlite3
from importlib.resources import files
from pathlib import Path

from sandbox.model.errors import SandboxError

_FILE_NAME = re.compile(r"(\d{4})_\w+\.sql")


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
    present, steps = check_not_newer(connection), _load_migrations()
    missing = [number for number in sorted(steps) if number > present]
    if present and missing:
        _back_up(connection, path.with_name(f"{path.name}.v{present}"))
    for number in missing:
        _apply_migration(connection, number, steps[number])


def check_not_newer(connection: sqlite3.Connection) -> int:
    """Return the version of the database. Raises StoreTooNewError, sqlite3.Error."""
    [present] = connection.execute("PRAGMA user_version").fetchone()
    newest = max(_load_migrations())
    if present > newest:
        raise StoreTooNewError(
            f"The index has version {present}, but this version of Sandbox supports versions up to {newest}. "
            "Start the version that wrote it, or run 'sandbox admin rebuild' to rebuild the index from the journals."
        )
    return int(present)


def check_current(connection: sqlite3.Connection) -> None:
    """Require the current version, for read-only use.

    Raises StoreTooNewError, sqlite3.Error, or StoreUnusableError for an older version.
    """
    present, newest = check_not_newer(connection), max(_load_migrations())
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
    found = ((_FILE_NAME.fullmatch(file.name), file) for file in (files(__package__) / "migrations").iterdir())
    return {int(name[1]): file.read_text(encoding="utf-8") for name, file in found if name}


def _apply_migration(connection: sqlite3.Connection, number: int, sql: str) -> None:
    try:
        connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
