"""Creates backups: a tar of journals, artifacts and tokens, with a manifest of checksums as its last member.

The index is omitted, because it is rebuilt from the journals. The working files of attempts are omitted, because a
sandbox cannot be restored.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from sandbox import __version__
from sandbox.interfaces.file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import BACKUP_MANIFEST_BYTES_MAX
from sandbox.model.wire.task_conversion import format_timestamp
from sandbox.primitives.durable_files import fsync_path, try_link

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
    """Writes to a stream that need not be seekable, and counts the bytes, because tarfile asks for the position."""

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

    If the disk does not support hard links, only a check before the rename prevents overwriting.
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
    """Add a task, unless it has already been removed. Raises OSError if the backup cannot be written."""
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
    directory = layout.root / "journal"
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
