"""Creates the directories of an attempt's disk, changes their owner to the sandbox's uid and restores the owner."""

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sandbox.interfaces.runtime import SANDBOX_HOME
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.rootfs_spec import DISK_DIRECTORIES

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_ERROR_BYTES_MAX = 500
_CHOWN_COMMAND = ("setpriv", "--pdeathsig", "KILL", "--", "chown", "--recursive", "--no-dereference")


def chown_tree(path: str, uid: int) -> None:
    """Make a sandbox's uid the owner of a tree that no sandbox has used yet.

    Raises OSError, and AttemptError for a hard-linked file.
    """
    _walk(path, uid, uid)


def restore_ownership(*paths: str) -> None:
    """Chown trees back to this process's user. Raises OSError."""
    if paths:
        _chown_used_trees(paths, os.getuid(), os.getgid())


def _chown_used_trees(paths: Sequence[str], uid: int, gid: int) -> None:
    """Chown trees that a sandbox has used. Files in them have hard links only in the other trees of the same disk.

    An agent can create millions of directories in a tree. chown(1) handles any number and depth of directories in
    bounded memory and does not follow links. Raises OSError.
    """
    for path in paths:
        os.close(os.open(path, _DIRECTORY_FLAGS))
    command = (*_CHOWN_COMMAND, "--", f"+{uid}:+{gid}", *paths)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_ENVIRONMENT
    ) as process:
        assert process.stderr is not None
        errors = process.stderr.read(_ERROR_BYTES_MAX)  # there may be one error per file
    if process.returncode != 0:
        reason = " ".join(errors.decode(errors="replace").split())
        raise OSError(reason or "the owner of the disk's files cannot be changed")


def _walk(path: str, uid: int, gid: int) -> None:
    directory_fd = os.open(path, _DIRECTORY_FLAGS)
    try:
        os.fchown(directory_fd, uid, gid)
        pending = [_chown_entries(directory_fd, uid, gid)]
        while pending:
            if pending[-1]:
                directory_fd = _open_child(directory_fd, pending[-1].pop())
                pending.append(_chown_entries(directory_fd, uid, gid))
            else:
                pending.pop()
                if pending:
                    directory_fd = _open_child(directory_fd, "..")
    finally:
        os.close(directory_fd)


def _open_child(directory_fd: int, name: str) -> int:
    child = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory_fd)
    os.close(directory_fd)
    return child


def _chown_entries(directory_fd: int, uid: int, gid: int) -> list[str]:
    """Chown every entry of one directory. Returns the names of its subdirectories."""
    directories = []
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                _reject_hard_link(entry)
            os.chown(entry.name, uid, gid, dir_fd=directory_fd, follow_symlinks=False)
    return directories


def _reject_hard_link(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"'{entry.name}' in the workspace has several hard links, so the sandbox could change a file "
            "outside the workspace; clone without hard links.",
        )


def create_disk_directories(disk: Path) -> None:
    """Create the missing directories. Raises OSError."""
    for name in DISK_DIRECTORIES:
        (disk / name).mkdir(parents=True, exist_ok=True)
    (disk / SANDBOX_HOME.removeprefix("/")).parent.chmod(0o755)
    (disk / "tmp").chmod(0o1777)


def chown_disk(disk: Path, uid: int, *, was_used: bool = False) -> None:
    """Chown the disk's directories to `uid`. was_used: an earlier sandbox used them. Raises AttemptError, OSError."""
    paths = [str(disk / name) for name in DISK_DIRECTORIES]
    if was_used:
        _chown_used_trees(paths, uid, uid)
        return
    for path in paths:
        chown_tree(path, uid)


def restore_disk_ownership(disk: Path) -> None:
    """Chown the disk's directories back to this process's user. Raises OSError."""
    names = (Path(name).parts[0] for name in DISK_DIRECTORIES)  # earlier versions: `home` is the home directory
    restore_ownership(*(str(disk / name) for name in names if (disk / name).exists()))
