"""Operations of `sandbox admin` on a data directory."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.private_directories import lock_data_dir, private_umask
from sandbox.disks.commands import remove_trees
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError
from sandbox.interfaces.server_services import PruneResult, Retention
from sandbox.interfaces.store import StoreError
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import INDEX_INTERVAL_SECONDS
from sandbox.placements.local.attempt_files import LocalAttemptFiles
from sandbox.primitives.files import fsync_path, try_link
from sandbox.server.index_writer import index_journals, update_index
from sandbox.server.integrity import Discrepancy, DiscrepancyKind, IntegrityCheck
from sandbox.server.preserved_sandboxes import FindFiles, PreservedFiles
from sandbox.server.pruning import Pruner
from sandbox.store.database import StoreUnusableError, checkpoint_wal
from sandbox.store.sqlite import SqliteStore


class DataDirNotFoundError(SandboxError):
    """The data directory does not exist."""

    code = "no_data"


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """The result of a rebuild. skipped: why tasks are missing from the new index, keyed by task id."""

    tasks_count: int
    skipped: Mapping[str, str]


def index_file(data_dir: Path) -> Path:
    """Return the path of the index."""
    return data_dir / "index.sqlite"


def check_data_dir(data_dir: Path, *, deep: bool) -> tuple[int, list[Discrepancy]]:
    """Return the number of tasks and all discrepancies. deep: also compare artifacts with their checksums.

    Raises DataDirNotFoundError, StoreTooNewError, StoreError, OSError.
    """
    require_data_dir(data_dir)
    journals = FileJournals(data_dir)
    try:
        store = SqliteStore(index_file(data_dir), read_only=True)
    except StoreUnusableError as error:
        task_ids = journals.task_ids()
        is_new = not task_ids and not index_file(data_dir).exists()
        return len(task_ids), [] if is_new else [Discrepancy("", DiscrepancyKind.INDEX_UNUSABLE, error.message)]
    try:
        check = IntegrityCheck(
            journals, store, data_dir, deep=deep, wait_for_indexing=lambda: time.sleep(2 * INDEX_INTERVAL_SECONDS)
        )
        discrepancies = list(check.find_discrepancies())
        return check.tasks_count, discrepancies
    finally:
        store.close()


def require_data_dir(data_dir: Path) -> None:
    """Raise DataDirNotFoundError if the data directory does not exist."""
    if not data_dir.is_dir():
        raise DataDirNotFoundError(f"{data_dir} does not exist; set the server's directory with --data-dir.")


def rebuild_index(data_dir: Path) -> RebuildResult:
    """Rebuild the index from the journals. The previous index is renamed to `index.sqlite.before`.

    Raises DataDirNotFoundError, DataDirBusyError, UnsafeDirectoryError, StoreUnusableError, StoreError, OSError. After
    an error, the index is unchanged.
    """
    require_data_dir(data_dir)
    with lock_data_dir(data_dir), private_umask():
        part = data_dir / "index.sqlite.new"
        _remove_database(part)
        try:
            rebuilt = _build_index(FileJournals(data_dir), part)
            _replace_index(index_file(data_dir), part)
        finally:
            _remove_database(part)  # on a full disk, an incomplete index would use up the remaining space
        return rebuilt


def _build_index(journals: FileJournals, file: Path) -> RebuildResult:
    """Build a new index as a single complete file. Raises StoreError."""
    store = SqliteStore(file)
    try:
        task_ids = journals.task_ids()
        skipped = index_journals(journals, store, task_ids, previously_indexed=task_ids)
        tasks_count = len(store.task_ids())
    finally:
        store.close()
    if not checkpoint_wal(file):  # SQLite also does this at `close`, but does not report a failure
        raise StoreError(
            "The new index could not be written completely, and the old one is unchanged; free disk space and "
            "try again."
        )
    fsync_path(file)
    return RebuildResult(tasks_count, skipped)


def prune_data_dir(data_dir: Path, retention: Retention, *, dry_run: bool) -> PruneResult:
    """Remove finished tasks that exceed the retention limits, and return them. dry_run: only return them.

    Raises DataDirNotFoundError, DataDirBusyError, UnsafeDirectoryError, StoreUnusableError, StoreError, OSError.
    """
    require_data_dir(data_dir)
    with lock_data_dir(data_dir):
        journals, clock, store = FileJournals(data_dir), SystemClock(), SqliteStore(index_file(data_dir))
        try:
            update_index(journals, store)
            preserved_files = PreservedFiles(_make_file_finder(data_dir))
            pruner = Pruner(data_dir, journals, store, preserved_files, clock, remove_trees)
            return asyncio.run(pruner.prune(retention, dry_run=dry_run))
        finally:
            store.close()


def _make_file_finder(data_dir: Path) -> FindFiles:
    """Return a function that finds the files of attempts on this host. Only a server can reach other hosts."""
    local = LocalAttemptFiles(data_dir, (), remove_trees)

    def find_files(location: AttemptLocation) -> LocalAttemptFiles:
        if location.placement:
            raise HostUnreachableError(
                location.host, "can be reached only by a server", "start the server, and try again"
            )
        return local

    return find_files


def _replace_index(index: Path, new: Path) -> None:
    """Replace the index. A crash leaves either the old or the new index intact.

    If SQLite cannot read the old index, a crash may leave no index; the server then rebuilds it when it starts.
    """
    if index.exists():
        backup = index.with_name("index.sqlite.before")
        if checkpoint_wal(index):
            _back_up_index(index, backup)
        else:
            index.rename(backup)
    for name in _sidecar_files(index):
        name.unlink(missing_ok=True)
    fsync_path(index.parent)  # the deletion must be durable before the rename: an old log would damage the new index
    new.rename(index)
    fsync_path(index.parent)


def _back_up_index(index: Path, target: Path) -> None:
    """Back up the index, replacing the previous backup only when the new one is complete."""
    part = target.with_name(f"{target.name}.new")
    part.unlink(missing_ok=True)
    try:
        if not try_link(index, part):
            shutil.copyfile(index, part)
            fsync_path(part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)  # rename leaves both names if they are links to the same file


def _remove_database(file: Path) -> None:
    for name in (file, *_sidecar_files(file)):
        name.unlink(missing_ok=True)


def _sidecar_files(file: Path) -> tuple[Path, ...]:
    """Return the files that SQLite keeps next to a database. They would damage another database at the same path."""
    return tuple(file.with_name(f"{file.name}-{kind}") for kind in ("wal", "shm"))
