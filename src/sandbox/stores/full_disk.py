"""Whether SQLite failed for want of room, which it does not always say itself."""

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

_ROOM_BYTES_MIN = 64 * 1024
"""SQLite needs about half of it beside a database to open it."""


def is_disk_full(error: sqlite3.Error | OSError, database: Path) -> bool:
    """Whether the disk of the database had no room for what was tried."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    if code not in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}:
        return code == sqlite3.SQLITE_FULL
    with suppress(OSError):
        there = os.statvfs(database.parent)
        return there.f_bavail * there.f_frsize < _ROOM_BYTES_MIN
    return False
