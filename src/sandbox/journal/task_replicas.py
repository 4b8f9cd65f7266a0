"""Replicates journals and artifacts, byte for byte, between the data directories of hosts.

The records of an untrusted host are checked first: a runner may write only some events, and only consistent ones.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal import record_format, writer
from sandbox.journal.journals import create_and_lock
from sandbox.journal.reader import find_record_offset, read_batch
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.events import AttemptStarted, TaskSubmitted, Transition
from sandbox.model.fixed_limits import (
    WORKER_ARTIFACT_RECORDS_BYTES_MAX,
    WORKER_ARTIFACTS_MAX,
    WORKER_RECORD_BYTES_MAX,
    WORKER_RECORD_VALUES_MAX,
    WORKER_SMALL_RECORD_BYTES_MAX,
)
from sandbox.model.state_machine import IllegalEventError, advance, replay, with_recorded_message
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.model.task_state import TaskState
from sandbox.primitives.files import create_private_file, fsync_path


class VerifiedCopy(NamedTuple):
    """A task computed from the records of a copy up to a byte offset, and the epoch of the last record.

    artifact_records_bytes: the size of all records of artifacts, as `WORKER_ARTIFACT_RECORDS_BYTES_MAX` counts them.
    """

    task: Task | None = None
    offset: int = 0
    epoch: int = 0
    artifact_records_bytes: int = 0


_SERVER_EVENTS = (TaskSubmitted, AttemptStarted)
_LARGE_EVENTS = (e.Output, e.AgentMessage, e.ToolCallStarted, e.ToolResult, e.AgentResult, e.AgentExited)
_ARTIFACT_RECORD_BYTES_MIN = 1024
_LONG_LINE_BYTES = 256 * 1024
_NESTING_MAX = 32
_INTEGER_BITS_MAX = 53
_long_line_lock = threading.Lock()
"""This lock is held while a long line is decoded.

Until the values of a line are counted, the line may need thirty times its size in memory.
"""


def artifact_record_bytes(line: bytes) -> int:
    """Return the bytes that the record of an artifact counts toward `WORKER_ARTIFACT_RECORDS_BYTES_MAX`."""
    return max(len(line), _ARTIFACT_RECORD_BYTES_MIN)


def split_lines(data: bytes) -> Iterator[bytes]:
    """Yield each line with its newline. A list of all lines could need a hundred times as much memory as the data."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        yield data[begin:end]
        begin = end


def _decode_untrusted(line: bytes) -> e.Record:
    """Decode a record. Raises JournalDamagedError if its size or its values exceed what a runner writes."""
    if len(line) > WORKER_RECORD_BYTES_MAX:
        raise JournalDamagedError(f"A record has more than {WORKER_RECORD_BYTES_MAX} bytes.")
    if not record_format.is_valid(line):
        raise JournalDamagedError("A record does not match its checksum.")
    with _long_line_lock if len(line) > _LONG_LINE_BYTES else contextlib.nullcontext():
        record = record_format.decode(line)
        if not isinstance(record.event, _LARGE_EVENTS) and len(line) > WORKER_SMALL_RECORD_BYTES_MAX:
            raise JournalDamagedError(f"Record {record.seq} has more than {WORKER_SMALL_RECORD_BYTES_MAX} bytes.")
        if isinstance(record.event, _SERVER_EVENTS):
            raise JournalDamagedError(f"Record {record.seq} has a type that only a server may write.")
        if not isinstance(record.event, e.Output):
            _check_values(record)
        if isinstance(record.event, e.Usage | e.Progress):
            _check_counts(record.seq, record.event)
    return record


def _check_values(record: e.Record) -> None:
    """Check the number, the nesting and the size of an event's values. Raises JournalDamagedError."""
    values: Sequence[Any] = (record.event,)
    values_left = WORKER_RECORD_VALUES_MAX
    for _ in range(_NESTING_MAX):
        items = [_items(value) for value in values if isinstance(value, dict | list | tuple | msgspec.Struct)]
        values_left -= sum(map(len, items))
        if values_left < 0 or any(isinstance(one, int) and one.bit_length() > _INTEGER_BITS_MAX for one in values):
            break
        values = [item for each in items for item in each]
        if not values:
            return
    raise JournalDamagedError(
        f"Record {record.seq} has a number that is too large, too many values, or values that are nested too deeply."
    )


def _check_counts(seq: int, event: e.Usage | e.Progress) -> None:
    """Check that the event does not lower a total and that its cost is possible. Raises JournalDamagedError."""
    is_negative = any(isinstance(value, int) and value < 0 for value in msgspec.structs.astuple(event))
    if is_negative or not 0 <= (event.cost_usd or 0.0) <= e.COST_USD_MAX:
        raise JournalDamagedError(f"Record {seq} has a negative count or an impossible cost.")


def _items(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return msgspec.structs.astuple(value) if isinstance(value, msgspec.Struct) else value


def verify_records(verified: VerifiedCopy, data: bytes) -> VerifiedCopy:
    """Return the state after the records. Raises JournalDamagedError if a runner must not write one of them."""
    task, epoch, artifact_records_bytes = verified.task, verified.epoch, verified.artifact_records_bytes
    for line in split_lines(data):
        record = _decode_untrusted(line)
        if task is None:
            raise JournalDamagedError("The server has no record of the task.")
        if not epoch <= record.epoch <= epoch + 1:
            raise JournalDamagedError(
                f"Record {record.seq} has the epoch {record.epoch}, but the previous epoch is {epoch}."
            )
        try:
            result = advance(task, record.event, seq=record.seq, at=record.at)
        except IllegalEventError as error:
            raise JournalDamagedError(f"Record {record.seq} is not allowed: {error.message}") from error
        if _states(result.transition) != _states(record.transition):
            raise JournalDamagedError(f"Record {record.seq} contains an incorrect state change.")
        task, epoch = with_recorded_message(result.task, record), record.epoch
        if len(task.artifacts) > WORKER_ARTIFACTS_MAX:
            raise JournalDamagedError(f"The task has more than {WORKER_ARTIFACTS_MAX} artifacts.")
        if isinstance(record.event, e.ArtifactCollected):
            artifact_records_bytes += artifact_record_bytes(line)
            if artifact_records_bytes > WORKER_ARTIFACT_RECORDS_BYTES_MAX:
                raise JournalDamagedError("The records of the task's artifacts are too large.")
    return VerifiedCopy(task, verified.offset + len(data), epoch, artifact_records_bytes)


def _states(transition: Transition | None) -> tuple[TaskState | None, TaskState] | None:
    return None if transition is None else (transition.previous_state, transition.new_state)


class ReceivedArtifactFile:
    """Implements `interfaces.journal.ArtifactCopy`. A `close` in another thread waits for the call that is running."""

    def __init__(self, artifact: Artifact, partial: Path, target: Path, on_close: Callable[[], None]) -> None:
        self._artifact = artifact
        self._partial = partial
        self._target = target
        self._on_close = on_close
        self._lock = threading.Lock()
        self._digest, self._size_bytes = hashlib.sha256(), 0
        self._is_published = False
        self._file = create_private_file(partial)

    def write(self, data: bytes) -> None:
        """Implements `ArtifactCopy.write`."""
        with self._lock:
            self._check_open()
            self._digest.update(data)
            self._size_bytes += len(data)
            self._file.write(data)

    def flush(self) -> None:
        """Implements `ArtifactCopy.flush`."""
        with self._lock:
            self._check_open()
            content = self._size_bytes, f"sha256:{self._digest.hexdigest()}"
            if content != (self._artifact.size_bytes, self._artifact.checksum):
                raise OSError(errno.EIO, "An artifact differs from its record", self._artifact.name)
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Implements `ArtifactCopy.publish`."""
        self._partial.rename(self._target)
        self._is_published = True

    def close(self) -> None:
        """Implements `ArtifactCopy.close`."""
        with self._lock:
            if self._file.closed:
                return
            try:
                with contextlib.suppress(OSError):  # an artifact that was not flushed is removed below
                    self._file.close()
                if self._is_published:
                    fsync_path(self._target.parent)
                else:
                    self._partial.unlink(missing_ok=True)
            finally:
                self._on_close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise OSError(errno.EBADF, "The artifact is closed", self._artifact.name)


def partial_name(number: str) -> str:
    """Return the name of a file that is being received. number: distinguishes files of one task."""
    return f"artifact-{number}.part"


_AFTER_LAST_SEQ = 10**18
_READ_BYTES = 2**20


class FileTaskReplicas:
    """Implements `interfaces.journal.TaskReplicas` for one data directory.

    The journal's lock is held only while a copy is extended, so it does not show whether the original has a writer.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._verified: dict[str, VerifiedCopy] = {}
        """The unfinished tasks of untrusted hosts, by id."""
        self._partials: set[Path] = set()
        """The incomplete artifacts that this process is writing."""
        self._partial_numbers = itertools.count(1)

    def end_offset(self, task_id: str) -> int:
        """Return the offset after the last record; see `TaskReplicas.end_offset`."""
        try:
            return find_record_offset(self._records_path(task_id), _AFTER_LAST_SEQ)
        except FileNotFoundError:
            return 0

    def read(self, task_id: str, offset: int, bytes_max: int) -> bytes:
        """Return the bytes of whole records; see `TaskReplicas.read`."""
        with self._records_path(task_id).open("rb") as original:
            original.seek(offset)
            data = original.read(bytes_max)
        return data[: data.rfind(b"\n") + 1]

    def receive(self, task_id: str, offset: int, data: bytes) -> int:
        """Append whole records; see `TaskReplicas.receive`."""
        first_seq = _check_lines(data)
        records_path = self._records_path(task_id)
        lock_fd = self._lock(records_path)
        try:
            end = self.end_offset(task_id)
            if offset > end:
                raise JournalOffsetError(f"The copy of the journal ends at byte {end}, before byte {offset}.")
            with records_path.open("r+b", buffering=0) as copy:
                os.ftruncate(copy.fileno(), end)
                if os.pread(copy.fileno(), min(len(data), end - offset), offset) != data[: end - offset]:
                    raise JournalOffsetError(f"Another writer has continued the journal at byte {offset}.")
                if first_seq > 1 and find_record_offset(records_path, first_seq - 1) >= offset:
                    raise JournalDamagedError(f"The records before number {first_seq} are missing.")
                rest = memoryview(data)[end - offset :]
                while rest:
                    rest = rest[os.pwrite(copy.fileno(), rest, offset + len(data) - len(rest)) :]
                os.fsync(copy.fileno())
            return max(end, offset + len(data))
        finally:
            os.close(lock_fd)

    def receive_untrusted(self, task_id: str, offset: int, data: bytes) -> int:
        """Append whole records that a runner may write; see `TaskReplicas.receive_untrusted`."""
        verified = self._read_verified(task_id)
        if offset > verified.offset:
            raise JournalOffsetError(f"The copy of the journal ends at byte {verified.offset}, before byte {offset}.")
        verified = verify_records(verified, data[verified.offset - offset :])
        end = self.receive(task_id, offset, data)
        if verified.task is not None and verified.task.state.is_final:
            self._verified.pop(task_id, None)
        else:
            self._verified[task_id] = verified
        return end

    def read_task(self, task_id: str) -> Task | None:
        """Return the task that the copy describes; see `TaskReplicas.read_task`."""
        verified = self._read_verified(task_id)
        if verified.task is not None and not verified.task.state.is_final:
            self._verified[task_id] = verified
        return verified.task

    def _read_verified(self, task_id: str) -> VerifiedCopy:
        """Return the state of the copy, including the records that this process wrote to the copy itself."""
        verified = self._verified.get(task_id, VerifiedCopy())
        try:
            if verified.offset > self.end_offset(task_id):
                verified = VerifiedCopy()
            while (batch := read_batch(self._records_path(task_id), verified.offset, _READ_BYTES)).records:
                task, artifact_records_bytes = verified.task, verified.artifact_records_bytes
                for record in batch.records:
                    task = replay(task, record)
                    if isinstance(record.event, e.ArtifactCollected):
                        artifact_records_bytes += artifact_record_bytes(record_format.encode(record))
                verified = VerifiedCopy(task, batch.next_offset, batch.records[-1].epoch, artifact_records_bytes)
        except FileNotFoundError:
            return VerifiedCopy()
        return verified

    def create_artifact(self, task_id: str, artifact: Artifact) -> "ReceivedArtifactFile":
        """Begin to store an artifact under its name; see `TaskReplicas.create_artifact`."""
        directory = TaskLayout(self._data_dir, _check_id(task_id)).artifacts
        if artifact.name in {"", ".", ".."} or "/" in artifact.name:
            raise OSError(errno.EINVAL, "An artifact's name is not a file name", artifact.name)
        directory.mkdir(mode=0o700, exist_ok=True)
        for leftover in directory.parent.glob(partial_name("*")):
            if leftover not in self._partials:
                leftover.unlink(missing_ok=True)
        partial = directory.parent / partial_name(str(next(self._partial_numbers)))
        self._partials.add(partial)
        try:
            return ReceivedArtifactFile(
                artifact, partial, directory / artifact.name, lambda: self._partials.discard(partial)
            )
        except BaseException:
            self._partials.discard(partial)
            raise

    def artifact_sizes(self, task_id: str) -> Mapping[str, int]:
        """Return the sizes of the stored artifacts; see `TaskReplicas.artifact_sizes`."""
        try:
            with os.scandir(TaskLayout(self._data_dir, _check_id(task_id)).artifacts) as entries:
                return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        except FileNotFoundError:
            return {}

    def _lock(self, records_path: Path) -> int:
        """Acquire the lock of the copy, after creating the copy if it is missing. Raises JournalBusyError, OSError."""
        if records_path.exists():
            return writer.acquire_lock(records_path.with_name("lock"), create=True)
        lock_fd = create_and_lock(records_path.parent)
        try:
            records_path.touch(0o600)
            for changed in (records_path.parent, *records_path.parent.parents[:3]):
                fsync_path(changed)
        except BaseException:
            os.close(lock_fd)
            raise
        return lock_fd

    def _records_path(self, task_id: str) -> Path:
        return TaskLayout(self._data_dir, _check_id(task_id)).journal / "records"


def _check_id(task_id: str) -> str:
    if not is_task_id(task_id):
        raise FileNotFoundError(f"{task_id!r} is not a valid task id for a journal")
    return task_id


def _check_lines(data: bytes) -> int:
    """Check that the data are consecutive records. Return the first record's number, or 0 if there is no record."""
    first_seq = 0
    for number, line in enumerate(split_lines(data)):
        if not record_format.is_valid(line):
            raise JournalDamagedError("A record does not match its checksum.")
        first_seq = first_seq or record_format.seq_of(line)
        if not record_format.has_seq(line, first_seq + number):
            raise JournalDamagedError(f"Record {first_seq + number} is missing.")
    return first_seq
