"""All journals of one data directory, and a watch that reports writes to them, with inotify(7).

The journal of a finished task may be compressed: it then has `records.gz` instead of `records`. If a crash left both,
the plain file is used. Readers try the plain file first, because it is removed only after `records.gz` is complete.
"""

import asyncio
import ctypes
import errno
import os
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from sandbox.interfaces.journal import (
    JournalBusyError,
    JournalDamagedError,
    Journals,
    JournalWriter,
    LockState,
    RecordBatch,
    ReplayState,
    WatchJournal,
)
from sandbox.interfaces.task_file_layout import TaskLayout, tasks_root
from sandbox.journal import writer
from sandbox.journal.compressed import CompressedJournal, compress_journal
from sandbox.journal.reader import (
    JournalEnd,
    decode_batch,
    find_journal_end,
    find_record_offset,
    has_first_record,
    read_batch,
)
from sandbox.journal.writer import FileJournalWriter, JournalRecorder
from sandbox.model.errors import SandboxError
from sandbox.model.events import Event, TaskFinished
from sandbox.model.state_machine import Effect, replay
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.primitives.files import fsync_path

_IN_MODIFY, _IN_Q_OVERFLOW = 0x2, 0x4000
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 64 * 1024
_NOTIFY_INTERVAL_SECONDS = 0.005
_libc = ctypes.CDLL(None, use_errno=True)


class FileJournalWatch:
    """Reports writes to journals with inotify(7). Its methods are called in the event loop.

    A journal that is written continuously is reported at most once per _NOTIFY_INTERVAL_SECONDS. While no journal is
    watched, no inotify instance is open.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._inotify_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._callbacks: dict[int, list[Callable[[], None]]] = {}
        """The callbacks of each watch, keyed by inotify's watch descriptor, which the kernel does not reuse."""

    @contextmanager
    def watch(self, task_id: str, notify: Callable[[], None]) -> Iterator[bool]:
        """Call `notify` after each write to the journal; see `WatchJournal`."""
        number = self._add(TaskLayout(self._data_dir, task_id).journal / "records")
        if number < 0:
            yield False
            return
        self._callbacks.setdefault(number, []).append(notify)
        try:
            yield True
        finally:
            self._callbacks[number].remove(notify)
            if not self._callbacks[number]:
                del self._callbacks[number]
                _libc.inotify_rm_watch(self._inotify_fd, number)
            if not self._callbacks:
                self._close()

    def _add(self, path: Path) -> int:
        """Return the watch descriptor; -1 if the kernel rejects the watch."""
        if self._inotify_fd < 0:
            self._inotify_fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._inotify_fd < 0:
                return -1
            self._loop = asyncio.get_running_loop()
            self._resume()
        number: int = _libc.inotify_add_watch(self._inotify_fd, os.fsencode(path), _IN_MODIFY)
        if number < 0 and not self._callbacks:
            self._close()
        return number

    def _close(self) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._inotify_fd)
        closed_fd, self._inotify_fd, self._loop, self._timer = self._inotify_fd, -1, None, None
        # The kernel waits until all readers have released a machine-wide lock. This takes seconds if a sandbox
        # deprives many of them of CPU time.
        threading.Thread(target=os.close, args=(closed_fd,), daemon=True).start()

    def _resume(self) -> None:
        assert self._loop is not None
        self._timer = None
        self._loop.add_reader(self._inotify_fd, self._read_events)

    def _read_events(self) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._inotify_fd)
        self._timer = self._loop.call_later(_NOTIFY_INTERVAL_SECONDS, self._resume)
        changed: set[int] = set()
        data = os.read(self._inotify_fd, _EVENTS_BYTES)
        while data:
            number, mask, _, name_bytes = _EVENT.unpack_from(data)
            changed |= set(self._callbacks) if mask & _IN_Q_OVERFLOW else {number}
            data = data[_EVENT.size + name_bytes :]
        for number in changed:
            for notify in self._callbacks.get(number, ()):
                notify()


class FileJournals:
    """Stores the journal of each task in `<data_dir>/tasks/<task id>/journal/`. Implements `Journals`.

    watch: see `WatchJournal`.
    """

    def __init__(self, data_dir: Path) -> None:
        self.watch: WatchJournal = FileJournalWatch(data_dir).watch
        self._data_dir = data_dir
        self._is_root_flushed = False
        """Whether this process has flushed the entry of the directory that contains all tasks."""

    def create(self, task_id: str) -> FileJournalWriter:
        """Create a journal. Its directories are flushed with record 1. Files from before a crash are reused.

        Raises OSError, or FileExistsError if the task has a journal or another process is creating one. Nothing is left
        after a failure.
        """
        directory = self._directory(task_id)
        lock_fd = create_and_lock(directory)
        try:
            _check_no_records(directory)
            return self._create_records(directory, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    def _create_records(self, directory: Path, lock_fd: int) -> FileJournalWriter:
        """Create an empty records file. The file and its parent directories are flushed with record 1."""
        records_path = directory / "records"
        try:
            os.close(os.open(records_path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if not self._is_root_flushed:
                fsync_path(self._data_dir)
                self._is_root_flushed = True
            return FileJournalWriter(records_path, lock_fd, JournalEnd(None, 0), (directory, *directory.parents[:2]))
        except BaseException:
            _remove_journal(directory, lock_fd)
            raise

    def discard(self, task_id: str, writer: JournalWriter) -> None:
        """Remove a journal without a record; see `Journals.discard`."""
        try:
            assert isinstance(writer, FileJournalWriter)
            _remove_journal(self._directory(task_id), writer.lock_fd)
        finally:
            writer.close()

    def open(self, task_id: str) -> FileJournalWriter:
        """Acquire the lock and start the next epoch; see `Journals.open`."""
        directory = self._directory(task_id)
        lock_fd = writer.acquire_lock(directory / "lock")
        try:
            journal_end = _find_accepted_end(directory / "records")
            # An earlier writer may have died after it wrote record 1 but before it flushed the directories.
            has_one_record = journal_end.last_record is not None and journal_end.last_record.seq == 1
            new_directories = (directory, *directory.parents[:2]) if has_one_record else ()
            return FileJournalWriter(directory / "records", lock_fd, journal_end, new_directories)
        except BaseException:
            os.close(lock_fd)
            raise

    def adopt(self, task_id: str, lock_fd: int) -> FileJournalWriter:
        """Open a journal with a lock that this process inherited as a descriptor; see `open`.

        After an error, the caller still has to close `lock_fd`.
        """
        directory = self._directory(task_id)
        writer.adopt_lock(directory / "lock", lock_fd)
        return FileJournalWriter(directory / "records", lock_fd, _find_accepted_end(directory / "records"))

    def read(self, task_id: str, offset: int = 0, *, bytes_max: int = 1 << 20) -> RecordBatch:
        """Read whole records from `offset`; see `Journals.read`."""
        records_path = self._directory(task_id) / "records"
        try:
            return read_batch(records_path, offset, bytes_max)
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records_path)) as packed:
                return decode_batch(records_path, offset, packed.lines(offset, bytes_max))

    def replay(self, task_id: str, state: ReplayState | None = None) -> ReplayState:
        """Compute a task from its journal; see `Journals.replay`."""
        replay_state = state or ReplayState(None, 0)
        while (batch := self.read(task_id, replay_state.offset)).records:
            task = replay_state.task
            for record in batch.records:
                task = replay(task, record)
            replay_state = ReplayState(task, batch.next_offset)
        return replay_state

    def recorder(
        self,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        *,
        on_effect: Callable[[Effect], None] = lambda _: None,
        transform: Callable[[Event], Event] = lambda event: event,
    ) -> JournalRecorder:
        """Create a recorder; see `Journals.recorder`."""
        return JournalRecorder(writer, task, now, on_effect=on_effect, transform=transform)

    def find_offset(self, task_id: str, seq: int) -> int:
        """Return the offset of record `seq`; see `Journals.find_offset`."""
        records_path = self._directory(task_id) / "records"
        try:
            return find_record_offset(records_path, seq)
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records_path)) as packed:
                return packed.find_offset(seq)

    def size_bytes(self, task_id: str) -> int:
        """Return the size in bytes; see `Journals.size_bytes`."""
        records_path = self._directory(task_id) / "records"
        try:
            return records_path.stat().st_size
        except FileNotFoundError:
            with CompressedJournal(_compressed_path(records_path)) as packed:
                return packed.size_bytes

    def compress(self, task_id: str) -> None:
        """Compress the journal of a finished task; see `Journals.compress`."""
        directory = self._directory(task_id)
        lock_fd = writer.acquire_lock(directory / "lock")
        try:
            compress_journal(directory / "records", _compressed_path(directory / "records"))
        finally:
            os.close(lock_fd)

    @contextmanager
    def try_lock(self, task_id: str) -> Iterator[bool]:
        """Hold the lock without opening the journal; see `Journals.try_lock`."""
        try:
            lock_fd = writer.acquire_lock(self._directory(task_id) / "lock")
        except (JournalBusyError, FileNotFoundError):
            yield False
            return
        try:
            yield True
        finally:
            os.close(lock_fd)

    def hand_over(self, writer: JournalWriter) -> AbstractContextManager[int]:
        """Yield the descriptor of the writer's lock to pass to another process; see `FileJournalWriter.hand_over`."""
        assert isinstance(writer, FileJournalWriter)
        return writer.hand_over()

    def lock_path(self, task_id: str) -> Path:
        """Return the path of the lock file."""
        return self._directory(task_id) / "lock"

    def lock_state(self, task_id: str) -> LockState:
        """Return HELD if a process of this host holds the lock now, otherwise FREE. Raises OSError."""
        return LockState.HELD if writer.is_locked(self._directory(task_id) / "lock") else LockState.FREE

    def task_ids(self) -> Sequence[str]:
        """Return the ids of the tasks that have record 1, sorted."""
        try:
            names = sorted(path.name for path in tasks_root(self._data_dir).iterdir())
        except FileNotFoundError:
            return []
        known = (name for name in names if is_task_id(name))
        return [task_id for task_id in known if _has_journal(self._directory(task_id) / "records")]

    def _directory(self, task_id: str) -> Path:
        """Return the journal's directory. The id is checked again, in case the manifest's rules have a bug."""
        if not is_task_id(task_id):
            raise FileNotFoundError(f"{task_id!r} is not a valid task id for a journal")
        return TaskLayout(self._data_dir, task_id).journal


def _compressed_path(records_path: Path) -> Path:
    return records_path.with_name("records.gz")


def _has_journal(records_path: Path) -> bool:
    return has_first_record(records_path) or _compressed_path(records_path).is_file()


def _find_accepted_end(records_path: Path) -> JournalEnd:
    """Return the end of an accepted task's journal. Record 1 was flushed, so if it is missing, the journal is damaged.

    Raises JournalDamagedError, FileNotFoundError.
    """
    journal_end = find_journal_end(records_path)
    if journal_end.last_record is None:
        raise JournalDamagedError(f"The journal does not begin with an intact record; restore {records_path}.")
    return journal_end


def _check_no_records(directory: Path) -> None:
    """Raise FileExistsError if the task has a journal, even a damaged one."""
    records_path = directory / "records"
    try:
        if not _compressed_path(records_path).exists() and (
            not records_path.exists() or find_journal_end(records_path).last_record is None
        ):
            return
    except JournalDamagedError:
        pass
    raise FileExistsError(errno.EEXIST, "The task already has a journal", str(records_path))


def create_and_lock(directory: Path) -> int:
    """Create the directories and the lock file. Acquire the lock and return its descriptor.

    Raises OSError, or FileExistsError if another process holds the lock.
    """
    try:
        for parent in reversed((directory, *directory.parents[:3])):
            parent.mkdir(mode=0o700, exist_ok=True)
        return writer.acquire_lock(directory / "lock", create=True)
    except JournalBusyError as error:
        raise FileExistsError(errno.EEXIST, "The task already has a journal", str(directory)) from error
    except OSError:
        _remove_empty_directories(directory)
        raise


def _remove_journal(directory: Path, lock_fd: int) -> None:
    """Remove a journal that has no record and whose lock is held.

    Errors are ignored, because the caller reports a more important one.
    """
    with suppress(OSError):
        if writer.is_lock_of(lock_fd, directory / "lock"):
            (directory / "records").unlink(missing_ok=True)
            (directory / "lock").unlink()
            _remove_empty_directories(directory)


def _remove_empty_directories(directory: Path) -> None:
    """Remove the journal's directory, and then the task's directory, if they are empty. Errors are ignored."""
    for emptied in (directory, directory.parent):
        with suppress(OSError):
            emptied.rmdir()


_AFTER_LAST_SEQ = 10**18
_RECORD_BYTES_MIN, _LAST_RECORD_BYTES = 64, 4096


def has_task_ended(journals: Journals, task_id: str) -> bool:
    """Return whether a task has ended or is gone. A task whose journal cannot be read now counts as not ended.

    Reads only a few records, whatever the journal's length, because any worker may cause any number of calls.
    """
    try:
        end = journals.find_offset(task_id, _AFTER_LAST_SEQ)
        if not end:
            return True
        seqs = range(1, end // _RECORD_BYTES_MIN + 2)
        last_seq = bisect_left(seqs, end, key=lambda seq: journals.find_offset(task_id, seq))
        records = journals.read(task_id, journals.find_offset(task_id, last_seq), bytes_max=_LAST_RECORD_BYTES).records
    except FileNotFoundError:
        return True
    except (SandboxError, OSError):
        return False
    return bool(records) and isinstance(records[-1].event, TaskFinished)
