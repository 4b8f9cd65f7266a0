"""What `sandbox admin` does to a data directory."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.bootstrap.data_dir_lock import held
from sandbox.bootstrap.machine import SystemClock
from sandbox.bootstrap.private_directory import only_ours, try_link
from sandbox.disks.removal import remove
from sandbox.interfaces.store import StoreError
from sandbox.interfaces.tasks import PrunedTask, Retention
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import SandboxError
from sandbox.model.limits import INDEX_INTERVAL_SECONDS
from sandbox.server.maintenance.integrity import Audit, Discrepancy, Kind
from sandbox.server.maintenance.pruning import Pruning, PruningRooms
from sandbox.server.preserved_sandboxes import Preservation
from sandbox.server.recovery import catch_up, index_journals
from sandbox.store.connections import fold_in_log
from sandbox.store.schema import StoreUnusableError
from sandbox.store.sqlite import SqliteStore
from sandbox.system.files import flush


class NoDataError(SandboxError):
    """There is no data directory where one was looked for."""

    code = "no_data"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A new index. refused: the tasks that are not in it, and why."""

    tasks_count: int
    refused: Mapping[str, str]


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


def rebuild_index(data_dir: Path) -> Rebuilt:
    """Make the index anew from the journals alone; the one before is kept as `index.sqlite.before`.

    Raises NoDataError, DataDirBusyError, UnsafePlaceError, StoreUnusableError, StoreError, OSError; the index is then
    as it was.
    """
    refuse_nothing(data_dir)
    with held(data_dir), only_ours():
        beside = data_dir / "index.sqlite.new"
        _remove_database(beside)
        try:
            rebuilt = _make_index(FileJournals(data_dir), beside)
            _replace_index(index_file(data_dir), beside)
        finally:
            _remove_database(beside)  # on a full disk it would take the room that is left
        return rebuilt


def _make_index(journals: FileJournals, file: Path) -> Rebuilt:
    """A whole index in one file. Raises StoreError."""
    store = SqliteStore(file)
    try:
        refused = index_journals(journals, store, journals.task_ids())
        tasks_count = len(store.task_ids())
    finally:
        store.close()
    if not fold_in_log(file):  # which SQLite does at `close`, and says nothing where it could not
        raise StoreError("The new index has not come to disk whole, and the old one stays: make room and try again.")
    flush(file)
    return Rebuilt(tasks_count, refused)


def prune_data(data_dir: Path, retention: Retention, *, dry_run: bool) -> Sequence[PrunedTask]:
    """Remove finished tasks that are kept no longer; gives them.

    Raises NoDataError, DataDirBusyError, UnsafePlaceError, StoreUnusableError, StoreError, OSError.
    """
    refuse_nothing(data_dir)
    with held(data_dir):
        journals, clock, store = FileJournals(data_dir), SystemClock(), SqliteStore(index_file(data_dir))
        try:
            catch_up(journals, store)
            preservation = Preservation(data_dir, remove)
            rooms = PruningRooms(data_dir, journals, store, preservation, clock, remove, flush)
            return asyncio.run(Pruning(rooms).prune(retention, dry_run=dry_run))
        finally:
            store.close()


def _replace_index(index: Path, new: Path) -> None:
    """A crash leaves the old index whole, or the new one.

    Of an old one that SQLite cannot read it may leave none: then the next server makes it of the journals.
    """
    if index.exists():
        kept = index.with_name("index.sqlite.before")
        if fold_in_log(index):
            _keep(index, kept)
        else:
            index.rename(kept)
    for name in _companions(index):
        name.unlink(missing_ok=True)
    flush(index.parent)  # before the new one has the name: with the old one's log it would be damaged
    new.rename(index)
    flush(index.parent)


def _keep(index: Path, kept: Path) -> None:
    """The one that was kept before goes when there is another."""
    beside = kept.with_name(f"{kept.name}.new")
    beside.unlink(missing_ok=True)
    try:
        if not try_link(index, beside):
            shutil.copyfile(index, beside)
            flush(beside)
        beside.rename(kept)
    finally:
        beside.unlink(missing_ok=True)  # of two names of one file rename leaves both


def _remove_database(file: Path) -> None:
    for name in (file, *_companions(file)):
        name.unlink(missing_ok=True)


def _companions(file: Path) -> tuple[Path, ...]:
    """What SQLite keeps beside a database; with another database they would be poison."""
    return tuple(file.with_name(f"{file.name}-{kind}") for kind in ("wal", "shm"))
