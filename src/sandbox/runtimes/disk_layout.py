"""The directories of an attempt's disk: creates them, chowns them to the sandbox's uid and restores ownership."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.file_layout import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.failure import AttemptError, FailureCode

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def chown_tree(path: str, uid: int, *, was_used: bool = False) -> None:
    """Chown a tree to a sandbox's uid.

    was_used: a sandbox used the tree before as its own mount, so all names of its files are inside the tree. Raises
    AttemptError for a file that also has a name elsewhere (hard link), and OSError.
    """
    _walk(path, uid, uid, reject_hard_links=not was_used)


def restore_ownership(path: str) -> None:
    """Chown a tree back to this process's user. Raises OSError."""
    _walk(path, os.getuid(), os.getgid(), reject_hard_links=False)


def _walk(path: str, uid: int, gid: int, *, reject_hard_links: bool) -> None:
    directory_fd = os.open(path, _DIRECTORY_FLAGS)
    try:
        os.fchown(directory_fd, uid, gid)
        pending = [_chown_entries(directory_fd, uid, gid, reject_hard_links)]
        while pending:
            if pending[-1]:
                directory_fd = _open_child(directory_fd, pending[-1].pop())
                pending.append(_chown_entries(directory_fd, uid, gid, reject_hard_links))
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


def _chown_entries(directory_fd: int, uid: int, gid: int, reject_hard_links: bool) -> list[str]:
    """Chown every entry of one directory. Returns the names of its subdirectories."""
    directories = []
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            elif reject_hard_links:
                _reject_hard_link(entry)
            os.chown(entry.name, uid, gid, dir_fd=directory_fd, follow_symlinks=False)
    return directories


def _reject_hard_link(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"'{entry.name}' in the workspace is a hard link, so the sandbox could change a file elsewhere; "
            "clone without hard links.",
        )


DISK_DIRECTORIES = {"workspace": SANDBOX_WORKSPACE, "home": SANDBOX_HOME, "tmp": "/tmp"}  # noqa: S108
"""Directories of an attempt's disk, and where they are mounted in the sandbox."""


def create_disk_directories(disk: Path) -> None:
    """Create the missing directories. Raises OSError."""
    for name in DISK_DIRECTORIES:
        (disk / name).mkdir(exist_ok=True)
    (disk / "tmp").chmod(0o1777)


def chown_disk(disk: Path, uid: int, *, was_used: bool = False) -> None:
    """Chown the disk's directories to `uid`. was_used: an earlier sandbox used them. Raises AttemptError, OSError."""
    for name in DISK_DIRECTORIES:
        chown_tree(str(disk / name), uid, was_used=was_used)


def restore_disk_ownership(disk: Path) -> None:
    """Chown the disk's directories back to this process's user. Raises OSError."""
    for name in DISK_DIRECTORIES:
        with suppress(FileNotFoundError):
            restore_ownership(str(disk / name))
