"""What `sandbox admin` does to a data directory."""

from __future__ import annotations

import time
from pathlib import Path

from sandbox.control.audit import Audit, Discrepancy, Kind
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import SandboxError
from sandbox.model.limits import INDEX_INTERVAL_SECONDS
from sandbox.stores.schema import StoreUnusableError
from sandbox.stores.sqlite import SqliteStore


class NoDataError(SandboxError):
    """There is no data directory where one was looked for."""

    code = "no_data"


def index_file(data_dir: Path) -> Path:
    """Where the index is."""
    return data_dir / "index.sqlite"


def check_data(data_dir: Path, *, deep: bool) -> tuple[int, list[Discrepancy]]:
    """How many tasks there are, and what does not agree. Raises NoDataError, StoreTooNewError, StoreError, OSError."""
    refuse_nothing(data_dir)
    journals = FileJournals(data_dir)
    try:
        store = SqliteStore(index_file(data_dir), read_only=True)
    except StoreUnusableError as error:
        task_ids = journals.task_ids()
        is_new = not task_ids and not index_file(data_dir).exists()
        return len(task_ids), [] if is_new else [Discrepancy("", Kind.INDEX_UNUSABLE, error.message)]
    try:
        audit = Audit(journals, store, data_dir, deep=deep, pause=lambda: time.sleep(2 * INDEX_INTERVAL_SECONDS))
        found = list(audit.discrepancies())
        return audit.tasks_count, found
    finally:
        store.close()


def refuse_nothing(data_dir: Path) -> None:
    """Raises NoDataError when this is no data directory."""
    if not data_dir.is_dir():
        raise NoDataError(f"{data_dir} is not there; name the server's directory with --data-dir.")
