"""Replicates journals and artifacts, byte for byte, between the data directories of hosts."""

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError
from sandbox.journal import lock, record_format
from sandbox.journal.journals import create_directories
from sandbox.journal.reader import find_record_offset
from sandbox.model.events import Artifact
from sandbox.model.manifest.field_formats import is_task_id
from sandbox.primitives.files import create_private_file, fsync_path, remove_on_failure, replace_durably

_AFTER_LAST_SEQ = 10**18


class FileTaskReplicas:
    """Implements `interfaces.journal.TaskReplicas` for one data directory.

    The journal's lock is held only while a copy is extended, so it does not show whether the original has a writer.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def end_offset(self, task_id: str) -> int:
        """Return the offset after the last record; see `TaskReplicas.end_offset`."""
        try:
            return find_record_offset(self._records(task_id), _AFTER_LAST_SEQ)
        except FileNotFoundError:
            return 0

    def read(self, task_id: str, offset: int, bytes_max: int) -> bytes:
        """Return the bytes of whole records; see `TaskReplicas.read`."""
        with self._records(task_id).open("rb") as original:
            original.seek(offset)
            data = original.read(bytes_max)
        return data[: data.rfind(b"\n") + 1]

    def receive(self, task_id: str, offset: int, data: bytes) -> int:
        """Append whole records; see `TaskReplicas.receive`."""
        first_seq = _check_lines(data)
        records = self._records(task_id)
        lock_fd = self._lock(records)
        try:
            end = self.end_offset(task_id)
            if offset > end:
                raise JournalOffsetError(f"The copy of the journal ends at byte {end}, before {offset}.")
            with records.open("r+b", buffering=0) as copy:
                os.ftruncate(copy.fileno(), end)
                if os.pread(copy.fileno(), min(len(data), end - offset), offset) != data[: end - offset]:
                    raise JournalOffsetError(f"Another writer has continued the journal at byte {offset}.")
                if first_seq > 1 and find_record_offset(records, first_seq - 1) >= offset:
                    raise JournalDamagedError(f"The records before number {first_seq} are missing.")
                rest = memoryview(data)[end - offset :]
                while rest:
                    rest = rest[os.pwrite(copy.fileno(), rest, offset + len(data) - len(rest)) :]
                os.fsync(copy.fileno())
            return max(end, offset + len(data))
        finally:
            os.close(lock_fd)

    def receive_artifact(self, task_id: str, artifact: Artifact, content: Iterable[bytes]) -> None:
        """Store an artifact under its name; see `TaskReplicas.receive_artifact`."""
        directory = TaskLayout(self._data_dir, _check_id(task_id)).artifacts
        if artifact.name in {"", ".", ".."} or "/" in artifact.name:
            raise OSError(errno.EINVAL, "An artifact's name is not a file name", artifact.name)
        directory.mkdir(mode=0o700, exist_ok=True)
        part = directory.parent / "artifact.part"
        digest, size_bytes = hashlib.sha256(), 0
        with remove_on_failure(part):
            with create_private_file(part) as file:
                for chunk in content:
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    file.write(chunk)
            if (size_bytes, f"sha256:{digest.hexdigest()}") != (artifact.size_bytes, artifact.checksum):
                raise OSError(errno.EIO, "An artifact differs from its record", artifact.name)
            replace_durably(part, directory / artifact.name)

    def _lock(self, records: Path) -> int:
        """Acquire the lock of the copy, after creating the copy if it is missing. Raises JournalBusyError, OSError."""
        if records.exists():
            return lock.acquire(records.with_name("lock"), create=True)
        lock_fd = create_directories(records.parent)
        try:
            records.touch(0o600)
            for changed in (records.parent, *records.parent.parents[:3]):
                fsync_path(changed)
        except BaseException:
            os.close(lock_fd)
            raise
        return lock_fd

    def _records(self, task_id: str) -> Path:
        return TaskLayout(self._data_dir, _check_id(task_id)).root / "journal" / "records"


def _check_id(task_id: str) -> str:
    if not is_task_id(task_id):
        raise FileNotFoundError(f"{task_id!r} is not a valid task id for a journal")
    return task_id


def _check_lines(data: bytes) -> int:
    """Check that the data are consecutive records. Return the number of the first one; 0 if there is none."""
    first_seq = 0
    for number, line in enumerate(data.splitlines(keepends=True)):
        if not record_format.is_complete(line):
            raise JournalDamagedError("A record does not match its checksum.")
        first_seq = first_seq or record_format.seq_of(line)
        if not record_format.has_seq(line, first_seq + number):
            raise JournalDamagedError(f"Record {first_seq + number} is missing.")
    return first_seq
