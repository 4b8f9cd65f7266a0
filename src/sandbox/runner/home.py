"""The agent's home, written to before a sandbox has it: also when an earlier one had it and left what it liked."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from sandbox.contracts.locked_entry import open_unlocked

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_home(home: Path, files: Mapping[str, bytes]) -> None:
    """Put files there by their relative paths, in place of what has the name. No link is followed. Raises OSError."""
    for name, content in files.items():
        *directories, last = PurePosixPath(name).parts
        here = _open(home)
        try:
            for directory in directories:
                here = _enter(here, directory)
            _replace(here, last, content)
        finally:
            os.close(here)


def _enter(here: int, name: str) -> int:
    """Into the directory of this name, made where there is none."""
    try:
        there = _open(name, here)
    except OSError:
        _unlink(here, name)
        os.mkdir(name, mode=0o700, dir_fd=here)
        there = _open(name, here)
    os.close(here)
    return there


def _open(name: str | Path, here: int | None = None) -> int:
    return open_unlocked(name, _DIRECTORY, here, rights=os.W_OK | os.X_OK)


def _replace(here: int, name: str, content: bytes) -> None:
    _unlink(here, name)
    with os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=here), "wb") as file:
        file.write(content)


def _unlink(here: int, name: str) -> None:
    """A directory is moved aside: emptying one that an agent filled may take without end."""
    try:
        os.unlink(name, dir_fd=here)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        os.rename(name, f"{name}.aside-{secrets.token_hex(4)}", src_dir_fd=here, dst_dir_fd=here)
