"""Backups of a data directory: creates them, and restores a data directory from one.

A backup is a tar of journals, artifacts and tokens, with a manifest of checksums as its last member. The index is
omitted, because it is rebuilt from the journals. The working files of attempts are omitted, because a sandbox cannot be
restored. A backup to restore is untrusted until it is completely verified.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import msgspec

from sandbox import __version__
from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.data_dir_maintenance import check_data_dir, rebuild_index
from sandbox.bootstrap.private_directories import private_umask
from sandbox.interfaces.task_file_layout import TaskLayout, tasks_root
from sandbox.journal.journals import FileJournals
from sandbox.model.artifacts import Artifact
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import DECODE_ERRORS, SandboxError
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import BACKUP_MANIFEST_BYTES_MAX
from sandbox.model.manifest.field_formats import TASK_ID
from sandbox.model.task import Task
from sandbox.primitives.files import fsync_path, try_link
from sandbox.server.ending_without_runner import end_without_follow_up
from sandbox.server.integrity import Discrepancy, DiscrepancyKind

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


MANIFEST_NAME = "manifest.json"
TOKENS_NAME = "tokens.json"
BACKUP_VERSION = 1
"""The newest backup format that this program supports."""


class BackupExistsError(SandboxError):
    """The target file of the backup already exists."""

    code = "backup_exists"


class BackupTooLargeError(SandboxError):
    """The backup would contain more files than its manifest can list."""

    code = "backup_too_large"


class BackupEntry(msgspec.Struct, frozen=True):
    """One file of a backup. sha256: 64 hex digits."""

    size_bytes: int
    sha256: str


class BackupManifest(msgspec.Struct, frozen=True, rename={"sandbox_version": "sandbox"}):
    """The content of a backup. remarks: problems with the original data; damaged files are included unchanged."""

    version: int
    sandbox_version: str
    created_at: str
    files: dict[str, BackupEntry]
    remarks: list[str]


@dataclass(slots=True)
class BackupInProgress:
    """A backup that is being written."""

    tar: tarfile.TarFile
    files: dict[str, BackupEntry] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    tasks_count: int = 0


def create_backup(data_dir: Path, target: Path) -> BackupManifest:
    """Write a backup to a temporary file and rename the file to `target`. Only the file's owner can read it (0600).

    Tasks may be running: the backup contains a consistent snapshot of each task. Raises BackupExistsError,
    BackupTooLargeError, OSError.
    """
    if os.path.lexists(target):
        raise _exists_error(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    descriptor = _create_partial(partial, target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                manifest = _write_backup(data_dir, BackupInProgress(tar))
            file.flush()
            os.fsync(file.fileno())
        _rename_to_target(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(target.parent)
    return manifest


def stream_backup(data_dir: Path, stream: BinaryIO) -> tuple[BackupManifest, int]:
    """Write a backup to a stream. Return its manifest and its size in bytes.

    The manifest is the last member, so `restore` detects a truncated backup. Raises BackupTooLargeError, OSError.
    """
    output = _CountingWriter(stream)
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        manifest = _write_backup(data_dir, BackupInProgress(tar))
    stream.flush()
    return manifest, output.tell()


class _CountingWriter(io.BufferedIOBase):
    """Wraps a stream that may not be seekable. Counts the written bytes, because tarfile calls `tell`."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._size_bytes = 0

    def write(self, data: ReadableBuffer, /) -> int:
        self._stream.write(data)
        written_bytes = memoryview(data).nbytes
        self._size_bytes += written_bytes
        return written_bytes

    def tell(self) -> int:
        return self._size_bytes


def _create_partial(partial: Path, target: Path) -> int:
    """Create the temporary file. Raises an OSError that names the target, or its missing directory."""
    try:
        return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        advice = "No such directory; create it first"
        raise FileNotFoundError(error.errno, advice, str(target.parent)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None


def _rename_to_target(partial: Path, target: Path) -> None:
    """Rename without overwriting.

    If the file system does not support hard links, only a check before the rename prevents overwriting.
    """
    try:
        if not try_link(partial, target):
            if os.path.lexists(target):
                raise _exists_error(target)
            partial.rename(target)
    except FileExistsError:
        raise _exists_error(target) from None


def _exists_error(target: Path) -> BackupExistsError:
    return BackupExistsError(f"{target} already exists; remove it, or choose another name.")


def _write_backup(data_dir: Path, backup: BackupInProgress) -> BackupManifest:
    tokens = data_dir / TOKENS_NAME
    if tokens.exists():
        with _open_hashing(tokens) as file:
            _add(backup, TOKENS_NAME, file, os.fstat(file.fileno()).st_size)
    journals = FileJournals(data_dir)
    for task_id in journals.task_ids():
        _add_task(backup, journals, TaskLayout(data_dir, task_id))
    created_at = format_timestamp(datetime.now(UTC))
    manifest = BackupManifest(BACKUP_VERSION, __version__, created_at, backup.files, backup.remarks)
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    if len(content) > BACKUP_MANIFEST_BYTES_MAX:
        problem = (
            f"The manifest for {len(backup.files)} files has {len(content)} bytes, but the maximum is "
            f"{BACKUP_MANIFEST_BYTES_MAX}"
        )
        raise BackupTooLargeError(f"{problem}; remove finished tasks with sandbox admin prune, and try again.")
    backup.tar.addfile(_tar_info(MANIFEST_NAME, len(content)), io.BytesIO(content))
    return manifest


def _add_task(backup: BackupInProgress, journals: FileJournals, layout: TaskLayout) -> None:
    """Add a task, unless it was removed or its journal is unreadable. Raises OSError if writing the backup fails."""
    with ExitStack() as stack:
        try:
            # While a process holds the lock, the task is not removed and its journal is not compressed.
            stack.enter_context(journals.try_lock(layout.task_id))
            name, file = _open_journal(stack, layout)
            size_bytes, artifacts = _inspect_journal(backup, journals, layout, name, file)
        except FileNotFoundError:
            return
        except OSError as error:
            backup.remarks.append(f"Task {layout.task_id} is left out: its journal cannot be read ({error.strerror})")
            return
        _add(backup, f"tasks/{layout.task_id}/journal/{name}", file, size_bytes)
        for artifact in artifacts:
            _add_artifact(backup, layout, artifact)


def _open_journal(stack: ExitStack, layout: TaskLayout) -> tuple[str, _HashingReader]:
    """Open the plain journal or, if there is none, the compressed one. Compression removes the plain one last."""
    directory = layout.journal
    try:
        return "records", stack.enter_context(_open_hashing(directory / "records"))
    except FileNotFoundError:
        return "records.gz", stack.enter_context(_open_hashing(directory / "records.gz"))


def _inspect_journal(
    backup: BackupInProgress, journals: FileJournals, layout: TaskLayout, name: str, file: _HashingReader
) -> tuple[int, tuple[Artifact, ...]]:
    """Return how many bytes of the journal file belong in the backup, and which artifacts the journal records."""
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        replay_state = journals.replay(layout.task_id)
    except SandboxError as error:
        backup.remarks.append(f"Task {layout.task_id}: {error.message}")
        return size_bytes, ()
    artifacts = replay_state.task.stored_files if replay_state.task else ()
    return replay_state.offset if name == "records" else size_bytes, artifacts


def _add_artifact(backup: BackupInProgress, layout: TaskLayout, artifact: Artifact) -> None:
    name = f"tasks/{layout.task_id}/artifacts/{artifact.name}"
    entry = None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_open_hashing(layout.artifacts / artifact.name))
            status = os.fstat(file.fileno())
        except OSError as error:
            backup.remarks.append(f"Task {layout.task_id}: artifact {artifact.name!r} is missing ({error.strerror})")
            return
        if stat.S_ISREG(status.st_mode):
            entry = _add(backup, name, file, status.st_size)
    if entry is None or f"sha256:{entry.sha256}" != artifact.checksum:
        backup.remarks.append(f"Task {layout.task_id}: artifact {artifact.name!r} does not match its checksum")


def _add(backup: BackupInProgress, name: str, file: _HashingReader, size_bytes: int) -> BackupEntry:
    backup.tar.addfile(_tar_info(name, size_bytes), file)
    if file.failure is not None:
        backup.remarks.append(f"{name!r} cannot be read completely ({file.failure.strerror}); the rest is zeros")
    entry = backup.files[name] = BackupEntry(size_bytes, file.digest.hexdigest())
    return entry


def _tar_info(name: str, size_bytes: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, 0o600
    return info


@contextmanager
def _open_hashing(path: Path) -> Iterator[_HashingReader]:
    with _HashingReader(io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))) as file:
        yield file


class _HashingReader(io.BufferedReader):
    """A file that is hashed while it is read.

    After a read error, `read` returns zeros: the tar header already contains the file's size, and more files follow.
    """

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes. tarfile always passes `size`."""
        data = self._read_or_pad(size or 0)
        self.digest.update(data)
        return data

    def _read_or_pad(self, size: int) -> bytes:
        if self.failure is None:
            try:
                return super().read(size)
            except OSError as error:
                self.failure = error
        return bytes(size)


_TASK_FILE = re.compile(r"tasks/([^/]+)/(journal/records(?:\.gz)?|artifacts/([^/\0]+))")
_NAME_BYTES_MAX = 255
_READ_BYTES_MAX = 1024 * 1024
_HEADER_BYTES_MAX = 64 * 1024
"""Maximum total size of a member's headers. In a backup that Sandbox created, they take up less than 3 KiB."""

_LISTED_BYTES_MIN = 100
"""Minimum size of a file's entry in the manifest, excluding the file's name."""

_HOST_LOST_MESSAGE = (
    "The task was running when the backup was created; everything stored until then is included. Submit the task again."
)


class BackupUnusableError(SandboxError):
    """The file is not a backup, or it is damaged; nothing was restored."""

    code = "backup_unusable"


class DataDirNotEmptyError(SandboxError):
    """The target of the restore exists and is not empty."""

    code = "data_dir_not_empty"


class RestoreTargetUnusableError(SandboxError):
    """A rename cannot replace the target."""

    code = "restore_place_unusable"


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """The result of a restore. lost: ids of the tasks that were running at the time of the backup (`host_lost`)."""

    tasks_count: int
    lost: Sequence[str]
    remarks: Sequence[str]
    discrepancies: Sequence[Discrepancy]


def restore(source: Path, data_dir: Path) -> RestoreResult:
    """Restore `data_dir`, which must be missing or empty, from a backup.

    The restore either completes or changes nothing. Tasks that had started end as `host_lost`; the next server starts
    the others. Raises BackupUnusableError, DataDirNotEmptyError, RestoreTargetUnusableError, StoreUnusableError,
    StoreError, OSError.
    """
    _check_target(data_dir)
    _check_regular_file(source)
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{data_dir.name}.", dir=data_dir.parent))
    try:
        with private_umask(), _BoundedReader(io.FileIO(source)) as file:
            manifest = _unpack(file, part)
            lost, not_ended = _end_lost_tasks(part)
        tasks_count = rebuild_index(part).tasks_count
        _, discrepancies = check_data_dir(part, deep=False)
        os.sync()
        part.rename(data_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    fsync_path(data_dir.parent)
    return RestoreResult(tasks_count, lost, manifest.remarks, [*not_ended, *discrepancies])


def _check_target(data_dir: Path) -> None:
    if data_dir.is_symlink():
        raise RestoreTargetUnusableError(f"{data_dir} is a symbolic link; specify its target directory.")
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise DataDirNotEmptyError(f"{data_dir} is not empty; restore into a directory that does not exist yet.")
    if os.path.ismount(data_dir):
        raise RestoreTargetUnusableError(
            f"{data_dir} is a mount point and cannot be replaced; restore into a directory under it."
        )


def _check_regular_file(source: Path) -> None:
    """Reject pipes, which may never deliver data, and devices, which may be endless."""
    if not stat.S_ISREG(source.stat().st_mode):
        raise BackupUnusableError(f"{source} is not a regular file; nothing was restored.")


def _unpack(file: _BoundedReader, directory: Path) -> BackupManifest:
    """Unpack all files and compare them with the manifest; return the manifest."""
    entries: dict[str, BackupEntry] = {}
    manifest: BackupManifest | None = None
    listed_bytes = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                file.end_header()
                cast("Any", tar).members.clear()  # otherwise tarfile would keep all members and their headers
                listed_bytes += len(member.name) + _LISTED_BYTES_MIN
                if tar.pax_headers or listed_bytes > BACKUP_MANIFEST_BYTES_MAX:
                    raise BackupUnusableError(
                        "The backup has global headers or more files than its manifest can list; nothing was restored."
                    )
                content = _member_content(tar, member)
                if manifest is not None:
                    raise BackupUnusableError(
                        "The backup has data after its manifest, so it was not created by Sandbox."
                    )
                if member.name == MANIFEST_NAME:
                    manifest = _decode_manifest(_read_manifest(content, member.size))
                else:
                    entries[member.name] = _store_member(content, directory, member.name)
                file.start_header()
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise BackupUnusableError(f"The backup is incomplete ({error}); use another one.") from error
    if manifest is None:
        raise BackupUnusableError("The backup ends before its manifest; use another backup.")
    if manifest.files != entries:
        mismatched = sorted(
            name for name in manifest.files.keys() | entries if manifest.files.get(name) != entries.get(name)
        )
        raise BackupUnusableError(f"The backup was modified or damaged: {mismatched[0]!r} is missing or differs.")
    return manifest


def _member_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    is_regular_file = member.type in {tarfile.REGTYPE, tarfile.AREGTYPE} and not member.sparse
    content = tar.extractfile(member) if is_regular_file else None
    if content is None:
        raise BackupUnusableError(
            f"{member.name!r} is not a regular file, so this is not a valid backup; nothing was restored."
        )
    return content


def _read_manifest(content: IO[bytes], size_bytes: int) -> bytearray:
    if size_bytes > BACKUP_MANIFEST_BYTES_MAX:
        raise BackupUnusableError(
            f"The backup's manifest has {size_bytes} bytes, which is too large; nothing was restored."
        )
    data = bytearray()
    while more := content.read(_READ_BYTES_MAX):
        data += more
    return data


def _decode_manifest(content: bytearray) -> BackupManifest:
    try:
        manifest = msgspec.json.decode(content, type=BackupManifest)
    except DECODE_ERRORS as error:
        raise BackupUnusableError(f"The backup's manifest is malformed ({error}).") from error
    if manifest.version > BACKUP_VERSION:
        raise BackupUnusableError(
            f"The backup has version {manifest.version}; restore it with a newer version of Sandbox."
        )
    return manifest


def _store_member(content: IO[bytes], directory: Path, name: str) -> BackupEntry:
    """Store a member as a new file under `directory`. Raises BackupUnusableError if the name is invalid."""
    path = _member_path(directory, name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size_bytes = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise BackupUnusableError(f"{name!r} is in the backup twice; nothing was restored.") from None
    with os.fdopen(descriptor, "wb") as file:
        while data := content.read(_READ_BYTES_MAX):
            digest.update(data)
            size_bytes += len(data)
            file.write(data)
    return BackupEntry(size_bytes, digest.hexdigest())


def _member_path(directory: Path, name: str) -> Path:
    if name == TOKENS_NAME:
        return directory / TOKENS_NAME
    match = _TASK_FILE.fullmatch(name)
    is_short = len(os.fsencode(name.rpartition("/")[2])) <= _NAME_BYTES_MAX
    if match is None or not is_short or TASK_ID.find_error(match[1]) is not None or match[3] in {".", ".."}:
        raise BackupUnusableError(f"{name!r} is not a valid name in a backup; nothing was restored.")
    return directory / name


def _end_lost_tasks(data_dir: Path) -> tuple[list[str], list[Discrepancy]]:
    """End the tasks whose runner is on another machine or uses the directory that was backed up.

    Returns the ended tasks, and those that could not be ended.
    """
    journals, lost, not_ended = FileJournals(data_dir), list[str](), list[Discrepancy]()
    if not tasks_root(data_dir).exists():
        tasks_root(data_dir).mkdir(mode=0o700)
    for task_id in journals.task_ids():
        (TaskLayout(data_dir, task_id).journal / "lock").touch(0o600)
        try:
            task = journals.replay(task_id).task
        except SandboxError:
            continue
        # Trust the directory's name, not the journal, which may name any task.
        if task is None or task.id != task_id or task.state.is_final or task.attempt is None:
            continue
        try:
            _end_task(journals, task)
        except (FileNotFoundError, SandboxError) as error:
            not_ended.append(
                Discrepancy(task_id, DiscrepancyKind.JOURNAL_DAMAGED, _describe_end_failure(task_id, error))
            )
        else:
            lost.append(task_id)
    return lost, not_ended


def _describe_end_failure(task_id: str, error: FileNotFoundError | SandboxError) -> str:
    if isinstance(error, SandboxError):
        return f"The task was running and cannot be ended: {error.message}"
    return (
        "The task's journal was compressed before the task ended. Before you start the server, run in the data "
        f"directory: gunzip tasks/{task_id}/journal/records.gz"
    )


def _end_task(journals: FileJournals, task: Task) -> None:
    recorder = journals.recorder(journals.open(task.id), task, SystemClock().now)
    try:
        end_without_follow_up(recorder, Failure(FailureCode.HOST_LOST, _HOST_LOST_MESSAGE))
    finally:
        recorder.writer.close()


class _BoundedReader(io.BufferedReader):
    """A file that rejects excessive reads and seeks.

    `tarfile` trusts the headers of a hostile archive: it reads a header of any claimed length into memory, and seeks to
    any position claimed for the next header. A member can also have many headers, and decoded headers need up to 25
    times as much memory.
    """

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self._header_bytes_left: int | None = _HEADER_BYTES_MAX

    def start_header(self) -> None:
        """Start counting: the following reads belong to the headers of the next member."""
        self._header_bytes_left = _HEADER_BYTES_MAX

    def end_header(self) -> None:
        """Stop counting: the following reads belong to a member's content."""
        self._header_bytes_left = None

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes. Raises BackupUnusableError."""
        bytes_max = 2 * _READ_BYTES_MAX if self._header_bytes_left is None else self._header_bytes_left
        if size is None or not 0 <= size <= bytes_max:
            raise BackupUnusableError("The backup has an invalid header; nothing was restored.")
        if self._header_bytes_left is not None:
            self._header_bytes_left -= size
        return super().read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Seek to a position. Raises BackupUnusableError."""
        if whence == os.SEEK_SET and not 0 <= offset < 2**63:
            raise BackupUnusableError("The backup has an invalid member; nothing was restored.")
        return super().seek(offset, whence)
