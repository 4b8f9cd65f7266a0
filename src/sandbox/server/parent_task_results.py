"""Stores what a new task takes over from an earlier one, before the new task is recorded."""

import errno
import os
import shutil
import stat
from pathlib import Path

from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.server_services import Inheritance
from sandbox.primitives.durable_files import fsync_path
from sandbox.primitives.file_permissions import create_private_file

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


def has_own_artifacts(layout: TaskLayout) -> bool:
    """Return whether a task has stored files that it has not taken over from another task. Raises OSError."""
    try:
        return any(not path.name.startswith(INHERITED_PREFIX) for path in layout.artifacts.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
