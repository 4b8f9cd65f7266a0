"""All journals below one data directory."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sandbox.contracts.journal import Batch, JournalBusyError, JournalDamagedError
from sandbox.contracts.layout import TaskLayout, tasks_root
from sandbox.journal import lock
from sandbox.journal.directory import flush
from sandbox.journal.eviction import evict
from sandbox.journal.extent import Extent, measure
from sandbox.journal.place import find_record
from sandbox.journal.reader import begins_with_record, read_batch
from sandbox.journal.writer import FileJournalWriter

_TASK_ID = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{0,127}", re.ASCII)


class FileJournals:
    """`<data_dir>/tasks/<task id>/journal/` with `records` and `lock`; the contract's `Journals`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def create(self, task_id: str) -> FileJournalWriter:
        """Begin a journal, its directories on disk. What a crash before record 1 left is taken over.

        Raises FileExistsError when the task has a journal, or gets one from somebody else at this moment.
        """
        directory = self._directory(task_id)
        _make(directory)
        try:
            lock_fd = lock.take(directory / "lock")
        except JournalBusyError as error:
            raise FileExistsError(errno.EEXIST, "The task has a journal already", str(directory)) from error
        try:
            _refuse_records(directory / "records")
            return FileJournalWriter(directory / "records", lock_fd, Extent(None, 0))
        except BaseException:
            os.close(lock_fd)
            raise

    def open(self, task_id: str) -> FileJournalWriter:
        """Take the lock and go on with the next epoch; the contract's `Journals.open`."""
        directory = self._directory(task_id)
        lock_fd = lock.take(directory / "lock")
        try:
            return FileJournalWriter(directory / "records", lock_fd, measure(directory / "records"))
        except BaseException:
            os.close(lock_fd)
            raise

    def adopt(self, task_id: str, lock_fd: int) -> FileJournalWriter:
        """As `open`, with an inherited lock. When it raises, `lock_fd` is still the caller's to close."""
        directory = self._directory(task_id)
        lock.adopt(directory / "lock", lock_fd)
        return FileJournalWriter(directory / "records", lock_fd, measure(directory / "records"))

    def read(self, task_id: str, offset: int = 0, *, bytes_max: int = 1 << 20) -> Batch:
        """Whole records from `offset` on; the contract's `Journals.read`."""
        return read_batch(self._directory(task_id) / "records", offset, bytes_max)

    def find(self, task_id: str, seq: int) -> int:
        """Where record `seq` begins; the contract's `Journals.find`."""
        return find_record(self._directory(task_id) / "records", seq)

    def size(self, task_id: str) -> int:
        """Bytes that there are; the contract's `Journals.size`."""
        return (self._directory(task_id) / "records").stat().st_size

    @contextmanager
    def holding(self, task_id: str) -> Iterator[bool]:
        """The lock alone; the contract's `Journals.holding`."""
        try:
            lock_fd = lock.take(self._directory(task_id) / "lock")
        except (JournalBusyError, FileNotFoundError):
            yield False
            return
        try:
            yield True
        finally:
            os.close(lock_fd)

    def evict(self, task_id: str) -> bool:
        """KILL the runner that holds the lock; the contract's `Journals.evict`."""
        return evict(self._directory(task_id) / "lock")

    def is_held(self, task_id: str) -> bool:
        """Somebody holds the lock at this moment."""
        return lock.is_held(self._directory(task_id) / "lock")

    def task_ids(self) -> Sequence[str]:
        """The tasks whose record 1 is whole, in the order of their ids."""
        try:
            names = sorted(path.name for path in tasks_root(self._data_dir).iterdir())
        except FileNotFoundError:
            return []
        known = (name for name in names if _TASK_ID.fullmatch(name))
        return [task_id for task_id in known if begins_with_record(self._directory(task_id) / "records")]

    def _directory(self, task_id: str) -> Path:
        """The manifest's rule keeps ids harmless; this keeps a mistake there from becoming a path elsewhere."""
        if not _TASK_ID.fullmatch(task_id):
            raise FileNotFoundError(f"No journal can have the task id {task_id!r}")
        return TaskLayout(self._data_dir, task_id).root / "journal"


def _refuse_records(records: Path) -> None:
    """A damaged journal is one too. Raises FileExistsError."""
    try:
        if measure(records).last is None:
            return
    except JournalDamagedError:
        pass
    raise FileExistsError(errno.EEXIST, "The task has a journal already", str(records))


def _make(directory: Path) -> None:
    """Make the directories and both files, and flush every directory that may have changed."""
    changed = [directory, *directory.parents[:3]]
    for parent in reversed(changed):
        parent.mkdir(mode=0o700, exist_ok=True)
    for name in ("records", "lock"):
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
        os.close(os.open(directory / name, flags, 0o600))
    for parent in changed:
        flush(parent)
