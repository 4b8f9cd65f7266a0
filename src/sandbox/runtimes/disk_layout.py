"""The directories of an attempt's disk: made, given to the sandbox's kernel uid, and taken back."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.layout import HOME, WORKSPACE
from sandbox.model.errors import AttemptError, FailureCode

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def give_tree(path: str, uid: int, *, was_given: bool = False) -> None:
    """Give a tree of ours away. Raises AttemptError for a file that has a name elsewhere too, OSError.

    was_given: a sandbox had it before and was its own mount, so all names of its files are in it.
    """
    _walk(path, uid, uid, refuse_links=not was_given)


def take_tree(path: str) -> None:
    """Make a tree that a sandbox had this process's own again. Raises OSError."""
    _walk(path, os.getuid(), os.getgid(), refuse_links=False)


def _walk(path: str, uid: int, gid: int, *, refuse_links: bool) -> None:
    here = os.open(path, _DIRECTORY)
    try:
        os.fchown(here, uid, gid)
        pending = [_change(here, uid, gid, refuse_links)]
        while pending:
            if pending[-1]:
                here = _step(here, pending[-1].pop())
                pending.append(_change(here, uid, gid, refuse_links))
            else:
                pending.pop()
                if pending:
                    here = _step(here, "..")
    finally:
        os.close(here)


def _step(here: int, name: str) -> int:
    there = os.open(name, _DIRECTORY, dir_fd=here)
    os.close(here)
    return there


def _change(here: int, uid: int, gid: int, refuse_links: bool) -> list[str]:
    """Change everything in one directory; gives the names of the directories in it."""
    directories = []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            elif refuse_links:
                _refuse_link(entry)
            os.chown(entry.name, uid, gid, dir_fd=here, follow_symlinks=False)
    return directories


def _refuse_link(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"'{entry.name}' in the workspace is a hard link, so giving it to the sandbox could give away "
            "a file elsewhere; clone without hard links.",
        )


PLACES = {"workspace": WORKSPACE, "home": HOME, "tmp": "/tmp"}  # noqa: S108
"""Directories of an attempt's disk and what they are inside."""


def make_places(disk: Path) -> None:
    """Make those that are not there. Raises OSError."""
    for name in PLACES:
        (disk / name).mkdir(exist_ok=True)
    (disk / "tmp").chmod(0o1777)


def give_places(disk: Path, uid: int, *, was_given: bool = False) -> None:
    """Everything in them becomes this uid's; was_given: an earlier sandbox had them. Raises AttemptError, OSError."""
    for name in PLACES:
        give_tree(str(disk / name), uid, was_given=was_given)


def take_places(disk: Path) -> None:
    """Everything in them becomes this process's own. Raises OSError."""
    for name in PLACES:
        with suppress(FileNotFoundError):
            take_tree(str(disk / name))
