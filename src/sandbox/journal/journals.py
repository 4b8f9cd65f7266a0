"""All journals below one data directory.

A finished task's journal may be packed: then `records.gz` is there in place of `records`. Where a crash left both, the
plain one counts. Readers look for that first: it is only removed when the other one is whole and in its place.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, JournalWriter, RecordBatch
from sandbox.interfaces.layout import TaskLayout, tasks_root
from sandbox.journal import lock
from sandbox.journal.compressed import CompressedJournal, compress_journal
from sandbox.journal.extent import Extent, find_record_offset, measure_extent
from sandbox.journal.lock import kill_lock_holder
from sandbox.journal.reader import has_first_record, read_batch, read_compressed_batch
from sandbox.journal.writer import FileJournalWriter
from sandbox.system.files import fsync_path

_TASK_ID = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{0,127}", re.ASCII)


class FileJournals:
    """`<data_dir>/tasks/<task id>/journal/` with `records` and `lock`; the contract's `Journals`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def create(self, task_id: str) -> FileJournalWriter:
        """Begin a journal, its directories on disk. What a crash before record 1 left is taken over.

        Raises FileExistsError when the task has a journal, or gets one from somebody else at this moment, OSError; of
        what could not be begun nothing is left.
        """
        directory = self._directory(task_id)
        lock_fd = _create_directories(directory)
        try:
            _check_no_records(directory)
            return _create_records(directory, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    def discard(self, task_id: str, writer: JournalWriter) -> None:
        """Remove a journal that has no record; the contract's `Journals.give_up`."""
        try:
            _remove_journal(self._directory(task_id), writer.lock_fd)
        finally:
            writer.close()

    def open(self, task_id: str) -> FileJournalWriter:
        """Take the lock and go on with the next epoch; the contract's `Journals.open`."""
        directory = self._directory(task_id)
        lock_fd = lock.acquire(directory / "lock")
        try:
            return FileJournalWriter(directory / "records", lock_fd, measure_extent(directory / "records"))
        except BaseException:
            os.close(lock_fd)
            raise

    def adopt(self, task_id: str, lock_fd: int) -> FileJournalWriter:
        """As `open`, with an inherited lock. When it raises, `lock_fd` is still the caller's to close."""
        directory = self._directory(task_id)
        lock.adopt(directory / "lock", lock_fd)
        return FileJournalWriter(directory / "records", lock_fd, measure_extent(directory / "records"))

    def read(self, task_id: str, offset: int = 0, *, bytes_max: int = 1 << 20) -> RecordBatch:
        """Whole records from `offset` on; the contract's `Journals.read`."""
        records = self._directory(task_id) / "records"
        try:
            return read_batch(records, offset, bytes_max)
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records)) as packed:
                return read_compressed_batch(packed, records, offset, bytes_max)

    def find_offset(self, task_id: str, seq: int) -> int:
        """Where record `seq` begins; the contract's `Journals.find`."""
        records = self._directory(task_id) / "records"
        try:
            return find_record_offset(records, seq)
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records)) as packed:
                return packed.find_offset(seq)

    def size_bytes(self, task_id: str) -> int:
        """Bytes that there are; the contract's `Journals.size`."""
        records = self._directory(task_id) / "records"
        try:
            return records.stat().st_size
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records)) as packed:
                return packed.size_bytes

    def compress(self, task_id: str) -> None:
        """Compress the journal of a finished task; the contract's `Journals.pack`."""
        directory = self._directory(task_id)
        lock_fd = lock.acquire(directory / "lock")
        try:
            compress_journal(directory / "records", _compressed_path(directory / "records"))
        finally:
            os.close(lock_fd)

    @contextmanager
    def try_lock(self, task_id: str) -> Iterator[bool]:
        """The lock alone; the contract's `Journals.holding`."""
        try:
            lock_fd = lock.acquire(self._directory(task_id) / "lock")
        except (JournalBusyError, FileNotFoundError):
            yield False
            return
        try:
            yield True
        finally:
            os.close(lock_fd)

    def kill_lock_holder(self, task_id: str) -> bool:
        """KILL the runner that holds the lock; the contract's `Journals.evict`."""
        return kill_lock_holder(self._directory(task_id) / "lock")

    def is_locked(self, task_id: str) -> bool:
        """Somebody holds the lock at this moment."""
        return lock.is_locked(self._directory(task_id) / "lock")

    def task_ids(self) -> Sequence[str]:
        """The tasks that have record 1, in the order of their ids."""
        try:
            names = sorted(path.name for path in tasks_root(self._data_dir).iterdir())
        except FileNotFoundError:
            return []
        known = (name for name in names if _TASK_ID.fullmatch(name))
        return [task_id for task_id in known if _has_journal(self._directory(task_id) / "records")]

    def _directory(self, task_id: str) -> Path:
        """The manifest's rule keeps ids harmless; this keeps a mistake there from becoming a path elsewhere."""
        if not _TASK_ID.fullmatch(task_id):
            raise FileNotFoundError(f"No journal can have the task id {task_id!r}")
        return TaskLayout(self._data_dir, task_id).root / "journal"


def _compressed_path(records: Path) -> Path:
    return records.with_name("records.gz")


def _has_journal(records: Path) -> bool:
    return has_first_record(records) or _compressed_path(records).is_file()


def _check_no_records(directory: Path) -> None:
    """A damaged journal is one too. Raises FileExistsError."""
    records = directory / "records"
    try:
        if not _compressed_path(records).exists() and (not records.exists() or measure_extent(records).last is None):
            return
    except JournalDamagedError:
        pass
    raise FileExistsError(errno.EEXIST, "The task has a journal already", str(records))


def _create_directories(directory: Path) -> int:
    """The directories, and the lock, which is held. Raises FileExistsError while somebody else holds it, OSError."""
    try:
        for parent in reversed((directory, *directory.parents[:3])):
            parent.mkdir(mode=0o700, exist_ok=True)
        return lock.acquire(directory / "lock", create=True)
    except JournalBusyError as error:
        raise FileExistsError(errno.EEXIST, "The task has a journal already", str(directory)) from error
    except OSError:
        _remove_empty_directories(directory)
        raise


def _create_records(directory: Path, lock_fd: int) -> FileJournalWriter:
    """No record yet, and everything before it on disk."""
    records = directory / "records"
    try:
        os.close(os.open(records, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for changed in (directory, *directory.parents[:3]):
            fsync_path(changed)
        return FileJournalWriter(records, lock_fd, Extent(None, 0))
    except BaseException:
        _remove_journal(directory, lock_fd)
        raise


def _remove_journal(directory: Path, lock_fd: int) -> None:
    """A journal without a record, whose lock is held; as far as the disk lets us, for somebody is told of worse."""
    with suppress(OSError):
        if lock.is_lock_of(lock_fd, directory / "lock"):
            (directory / "records").unlink(missing_ok=True)
            (directory / "lock").unlink()
            _remove_empty_directories(directory)


def _remove_empty_directories(directory: Path) -> None:
    """Neither of the two where somebody has begun something in it meanwhile."""
    for emptied in (directory, directory.parent):
        with suppress(OSError):
            emptied.rmdir()
