"""The tree of the base commit, read from `git ls-tree`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.workspace.cancellable_thread import StopFlag
from sandbox.workspace.git.command import Git, GitError
from sandbox.workspace.git.pipes import pipe, run_thread_with_git
from sandbox.workspace.rooted_files import ENTRIES_MAX, PATHS_BYTES_MAX, Entry

GITLINK_MODE = b"160000"
TREE_MODE = b"040000"
SYMLINK_MODE = b"120000"
EXECUTABLE_MODE = b"100755"
_FILE_MODE = b"100644"
_CHUNK_BYTES = 256 * 1024
_LS_TREE_LINE = re.compile(
    rb"(?P<mode>[0-7]{6}) [a-z]+ (?P<id>[0-9a-f]{40}|[0-9a-f]{64}) +(?P<size>[0-9]{1,18}|-)\t(?P<path>.+)", re.DOTALL
)


def git_mode(entry: Entry) -> bytes:
    """Return the mode that git would record for a file or link in the workspace."""
    if entry.is_link:
        return SYMLINK_MODE
    return EXECUTABLE_MODE if entry.mode & 0o100 else _FILE_MODE


def canonical_mode(mode: bytes) -> bytes:
    """Normalize a mode. Old repositories contain 100664, which git reads as 100644."""
    return mode if mode in (SYMLINK_MODE, EXECUTABLE_MODE) else _FILE_MODE


class BaseTreeEntry(NamedTuple):
    """A file, symbolic link or gitlink of the base commit, or a directory if it was listed with `-t`.

    size_bytes: 0 for a gitlink and a directory.
    """

    path: bytes
    mode: bytes
    object_id: bytes
    size_bytes: int


def parse_ls_tree(listing: IO[bytes]) -> Iterator[BaseTreeEntry]:
    """Yield the entries of `git ls-tree -r -l -z`. Raises GitError for output that an intact git never writes."""
    remaining = b""
    while chunk := listing.read(_CHUNK_BYTES):
        *lines, remaining = (remaining + chunk).split(b"\0")
        if len(remaining) > _CHUNK_BYTES:
            raise GitError(0, b"fatal: a path is too long")
        yield from map(_parse_entry, lines)


def _parse_entry(line: bytes) -> BaseTreeEntry:
    """Parse one untrusted line: a repository may have exploited git, and the paths are used on the host."""
    match = _LS_TREE_LINE.fullmatch(line)
    if match is None or not {b"", b".", b".."}.isdisjoint(match["path"].split(b"/")):
        raise GitError(0, b"fatal: invalid path in a tree")
    size = match["size"]
    return BaseTreeEntry(match["path"], match["mode"], match["id"], 0 if size == b"-" else int(size))


def new_directories(path: bytes, previous: bytes) -> Iterator[bytes]:
    """Yield a path's directories, except those that also contain `previous`, the path before it in tree order."""
    while (path := path.rpartition(b"/")[0]) and not previous.startswith(path + b"/"):
        yield path


class BaseTree:
    """The tree of the base commit: its entries, keyed by path, and the directories that contain them."""

    def __init__(self, entries: Iterator[BaseTreeEntry]) -> None:
        self.entries: dict[bytes, BaseTreeEntry] = {}
        self.directories: set[bytes] = set()
        self._entries_left, self._path_bytes_left = ENTRIES_MAX, PATHS_BYTES_MAX
        for entry in entries:
            self._count(entry.path)
            self.entries[entry.path] = entry
            self._add_parents(entry.path)

    def _add_parents(self, path: bytes) -> None:
        while path := path.rpartition(b"/")[0]:
            if path in self.directories:
                return
            self._count(path)
            self.directories.add(path)

    def _count(self, path: bytes) -> None:
        """Count a file or directory. Staging did the same, but a git process compromised later may list more."""
        self._entries_left -= 1
        self._path_bytes_left -= len(path)
        if self._entries_left < 0 or self._path_bytes_left < 0:
            raise GitError(0, b"fatal: the tree is larger than it was")

    @property
    def ignore_files(self) -> list[BaseTreeEntry]:
        """The `.gitignore` files. git reads them only if they are regular files."""
        named = (entry for entry in self.entries.values() if entry.path.rpartition(b"/")[2] == b".gitignore")
        return [entry for entry in named if entry.mode not in (SYMLINK_MODE, GITLINK_MODE)]


async def read_base_tree(git: Git, repository: Path, commit: str) -> BaseTree:
    """Read the whole tree of a commit. Raises GitError."""
    with pipe() as (reader, writer):

        def read(stop: StopFlag) -> BaseTree:
            return BaseTree(parse_ls_tree(reader))

        listing = git.run(*ls_tree_arguments(commit), directory=repository, stdout=writer)
        return await run_thread_with_git(read, listing)


def ls_tree_arguments(commit: str, *options: str) -> tuple[str, ...]:
    """Return the arguments that list a commit's tree, in a git directory, for `parse_ls_tree`."""
    return ("--git-dir=.", "ls-tree", "-r", "-l", "-z", "--full-tree", *options, "--end-of-options", commit)
