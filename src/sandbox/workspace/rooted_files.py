"""Accesses the workspace's files without ever leaving the workspace.

The agent may have created anything: links to anywhere, devices, FIFOs, names that are not text. So every component of a
path is opened relative to its parent without following symbolic links, and only regular files are opened for reading.
Paths are bytes relative to the root; `b""` is the root itself.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sandbox.model.display_text import replace_unprintable
from sandbox.primitives.concurrency import StopFlag
from sandbox.primitives.files import open_granting_access

PATH_BYTES_MAX = 3500
"""Maximum length of a path; longer paths are skipped. The kernel and git accept 4095 bytes in one call."""

DEPTH_MAX = 256
"""Maximum depth of directories; deeper ones are skipped."""

ENTRIES_MAX = 1_000_000
"""Maximum number of files and directories that are read from one workspace."""

PATHS_BYTES_MAX = 256 * 1024**2
"""Maximum total size of all paths of one commit, or of one workspace. They are kept in memory."""

_CHUNK_BYTES = 256 * 1024
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class TooManyEntriesError(Exception):
    """The workspace has too many entries, or their paths total too many bytes. The message names the exceeded limit."""


class UnreadableError(OSError):
    """A file cannot be read up to the size that it had when it was opened."""


class Entry(msgspec.Struct, frozen=True):
    """A directory entry. `mode` is the mode of the entry itself, never of a link's target (inode(7))."""

    path: bytes
    mode: int

    @property
    def name(self) -> bytes:
        """The last part of the path. Computed, because there may be a million entries in memory."""
        return self.path.rpartition(b"/")[2]

    @property
    def is_directory(self) -> bool:
        """Whether the entry is itself a directory, and not a link to a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether the entry is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether the entry is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_within_limits(self) -> bool:
        """Whether the path's length and depth are within the limits."""
        return len(self.path) <= PATH_BYTES_MAX and self.path.count(b"/") < DEPTH_MAX


class RootedFiles:
    """Accesses the files under one root. A context manager, which keeps the root open. Methods raise OSError."""

    def __init__(self, root: Path) -> None:
        self._root = open_granting_access(root, _DIRECTORY_FLAGS)
        self._entry_count = 0
        self._path_bytes = 0

    def __enter__(self) -> "RootedFiles":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    @contextmanager
    def open_directory(self, path: bytes) -> Iterator[int]:
        """Yield a descriptor of the directory; it is closed at the end of the block."""
        directory = os.dup(self._root)
        try:
            for name in path.split(b"/") if path else ():
                child = open_granting_access(name, _DIRECTORY_FLAGS, directory)
                os.close(directory)
                directory = child
            yield directory
        finally:
            os.close(directory)

    def entries(self, path: bytes) -> list[Entry]:
        """Return the directory's entries, sorted by path.

        Raises TooManyEntriesError if all calls together exceed a limit.
        """
        result = []
        prefix = path + b"/" if path else b""
        with self.open_directory(path) as directory, os.scandir(directory) as listing:
            for item in listing:
                name = os.fsencode(item.name)
                self._entry_count += 1
                self._path_bytes += len(prefix) + len(name)
                if self._entry_count > ENTRIES_MAX:
                    raise TooManyEntriesError(f"more than {ENTRIES_MAX} files")
                if self._path_bytes > PATHS_BYTES_MAX:
                    raise TooManyEntriesError(f"more than {PATHS_BYTES_MAX // 1024**2} MiB of paths in total")
                result.append(Entry(prefix + name, item.stat(follow_symlinks=False).st_mode))
        return sorted(result, key=lambda entry: entry.path)

    @contextmanager
    def open_file(self, path: bytes) -> Iterator[tuple[int, int]]:
        """Yield the descriptor and the size of a regular file. Raises OSError for anything else."""
        parent, _, name = path.rpartition(b"/")
        with self.open_directory(parent) as directory:
            file = open_granting_access(name, _FILE_FLAGS, directory)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path!r} is not a regular file")
            yield file, status.st_size
        finally:
            os.close(file)

    def read_link(self, path: bytes) -> bytes:
        """Return the target of a symbolic link."""
        parent, _, name = path.rpartition(b"/")
        with self.open_directory(parent) as directory:
            return os.readlink(name, dir_fd=directory)


def read_chunks(file: int, size: int, stop: StopFlag) -> Iterator[bytes]:
    """Yield exactly `size` bytes; later growth is not read. Raises UnreadableError, WorkStoppedError."""
    while size:
        stop.raise_if_requested()
        try:
            chunk = os.read(file, min(size, _CHUNK_BYTES))
        except OSError as error:
            raise UnreadableError(error.errno, error.strerror) from error
        if not chunk:
            raise UnreadableError("it was truncated while it was read")
        size -= len(chunk)
        yield chunk


def printable_path(path: bytes) -> str:
    """Return a path as text, with %XX for each byte that is not UTF-8 or not a visible character."""
    return replace_unprintable(path.decode(errors="surrogateescape"), _escape)


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))
