"""Chooses the run directory: the short, private directory that contains the sockets of a data directory's runners."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sandbox.bootstrap.private_directory import UnsafeDirectoryError, make_private_directory

_USER_RUNTIME_ROOT = Path("/run/user")
"""Parent of the runtime directories of logged-in users (pam_systemd(8))."""

_SHARED_ROOT = Path("/tmp")  # noqa: S108  (see `_run_dir_candidates`)
"""A directory that exists without a login session, in which any user can create files."""


def choose_run_dir(data_dir: Path) -> Path:
    """Return a short, private directory for sockets, one per data directory.

    A Unix socket's path can have at most 107 bytes. The name is derived from the data directory's inode, not from its
    path, so a server finds its live runners even if it is started with another path to the same directory. Raises
    UnsafeDirectoryError, OSError.
    """
    status = data_dir.stat()
    name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:12]
    candidates = _run_dir_candidates()
    # XDG_RUNTIME_DIR differs between login sessions, so first look for the directory of an earlier server's runners.
    parent = next((candidate for candidate in candidates if (candidate / name).is_dir()), candidates[0])
    make_private_directory(parent)
    return make_private_directory(parent / name)


def _run_dir_candidates() -> Sequence[Path]:
    """Return candidate directories, best first.

    Any user could create the one in /tmp first, so it is left out if it belongs to another user. Raises
    UnsafeDirectoryError if no other candidate exists.
    """
    user = os.geteuid()
    if user == 0:
        return (Path("/run/sandbox"),)
    runtime_dir, usual = os.environ.get("XDG_RUNTIME_DIR"), _USER_RUNTIME_ROOT / str(user)
    shared = _SHARED_ROOT / f"sandbox-{user}"
    preferred = (Path(runtime_dir) / "sandbox",) if runtime_dir else ()
    if not _belongs_to_another_user(shared):
        return (*preferred, shared, usual / "sandbox")
    if not preferred and not usual.is_dir():
        remedy = "remove it, or set XDG_RUNTIME_DIR to a directory of this user"
        raise UnsafeDirectoryError(f"{shared} belongs to another user; {remedy}.")
    return (*preferred, usual / "sandbox")


def _belongs_to_another_user(path: Path) -> bool:
    try:
        return path.lstat().st_uid != os.geteuid()
    except FileNotFoundError:
        return False
