"""Stores what a new task takes over from an earlier one, before the new task is recorded."""

import errno
import logging
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.file_layout import TaskLayout, tasks_root
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.server_services import Inheritance
from sandbox.interfaces.store import Store
from sandbox.model.errors import SandboxError
from sandbox.model.manifest.field_formats import is_task_id
from sandbox.primitives.files import create_private_file, fsync_path

_log = logging.getLogger(__name__)


INHERITED_PREFIX = "inherited-"
"""The names of all files that a task takes over begin with this prefix."""

_CANNOT_LINK = frozenset({errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV})
"""Errors of link(2) if the file has the maximum number of links, or if the file system does not support links."""


class FileChangedError(OSError):
    """A file of the earlier task does not match that task's journal."""


def store_inheritance(layout: TaskLayout, inheritance: Inheritance) -> None:
    """Link all files into the directory of the new task's artifacts, and flush the directory.

    Stored artifacts never change, so the tasks share them: a link needs no disk space, and the file remains when the
    earlier task is removed. A file that cannot have another link is copied. The runner compares the checksum before it
    uses a file. The caller holds the lock of the new task's journal, which has no record yet. Raises OSError.
    """
    discard_inheritance(layout)
    layout.artifacts.mkdir(mode=0o700)
    for artifact in inheritance.parent.files:
        path = layout.artifacts / artifact.name
        source = inheritance.sources.get(artifact.name)
        if source is None:
            with create_private_file(path) as file:
                file.write(inheritance.conversation)
            fsync_path(path)
        else:
            _link_or_copy(source, path, artifact.size_bytes)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != artifact.size_bytes:
            raise FileChangedError(f"{source or artifact.name} does not have its recorded size")
    fsync_path(layout.artifacts)
    fsync_path(layout.root)


def _link_or_copy(source: Path, path: Path, size_bytes: int) -> None:
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        _copy(source, path, size_bytes)


def _copy(source: Path, path: Path, size_bytes: int) -> None:
    """Copy a regular file of this size and flush the copy. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(source, flags), "rb") as file, create_private_file(path) as copy:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            raise FileChangedError(f"{source} does not have its recorded size")
        shutil.copyfileobj(file, copy)
    fsync_path(path)


def discard_inheritance(layout: TaskLayout) -> None:
    """Remove the files of a task that was not recorded."""
    shutil.rmtree(layout.artifacts, ignore_errors=True)


def discard_unrecorded_tasks(data_dir: Path, journals: Journals, store: Store) -> None:
    """Remove the files and journals of tasks for which an earlier server died before it wrote the first record.

    Such a task was never acknowledged: its journal exists and is empty, and the task is not in the index. Call this
    function before the server accepts tasks. Raises StoreError.
    """
    try:
        names = [path.name for path in tasks_root(data_dir).iterdir() if is_task_id(path.name)]
    except FileNotFoundError:
        return
    accepted = frozenset(journals.task_ids()) | store.task_ids()
    for task_id in names:
        layout = TaskLayout(data_dir, task_id)
        if task_id in accepted:
            continue
        try:
            was_accepted = has_own_artifacts(layout)
        except OSError as error:
            _log.error("Task %s has no record, and its files cannot be listed (%s); check the disk", task_id, error)
            continue
        if was_accepted:
            # A backup contains zeros in place of a journal that could not be read. They look like an unfinished record.
            _log.error("Task %s has results, but its journal has no record; restore the journal from a backup", task_id)
            continue
        if layout.artifacts.is_dir() and _has_empty_journal(journals, task_id):
            discard_inheritance(layout)
            _log.info("Removed the files of task %s, which was never accepted", task_id)
        with suppress(OSError):  # the journal may be damaged
            if [path.name for path in layout.root.iterdir()] in ([], ["journal"]):
                journals.discard(task_id, journals.create(task_id))


def has_own_artifacts(layout: TaskLayout) -> bool:
    """Return whether a task has stored files that it has not taken over from another task. Raises OSError."""
    try:
        return any(not path.name.startswith(INHERITED_PREFIX) for path in layout.artifacts.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _has_empty_journal(journals: Journals, task_id: str) -> bool:
    """Return whether the journal exists and has no record. Returns False if the journal is missing or damaged."""
    try:
        return journals.replay(task_id).task is None
    except (SandboxError, OSError):
        return False
