"""The tree of the base commit, as `git ls-tree` tells it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.workspace.files import ENTRIES_MAX, PATHS_BYTES_MAX, Entry
from sandbox.workspace.git import Git, GitError
from sandbox.workspace.pipes import pipe, run_with_thread
from sandbox.workspace.stoppable import Stop

GITLINK = b"160000"
LINK = b"120000"
EXECUTABLE = b"100755"
_FILE = b"100644"
_CHUNK_BYTES = 256 * 1024
_LINE = re.compile(
    rb"(?P<mode>[0-7]{6}) [a-z]+ (?P<id>[0-9a-f]{40}|[0-9a-f]{64}) +(?P<size>[0-9]{1,18}|-)\t(?P<path>.+)", re.DOTALL
)


def mode_of(entry: Entry) -> bytes:
    """What git would record of a file or link in the workspace."""
    if entry.is_link:
        return LINK
    return EXECUTABLE if entry.mode & 0o100 else _FILE


def canonical_mode(mode: bytes) -> bytes:
    """Old repositories have 100664, which git reads as 100644."""
    return mode if mode in (LINK, EXECUTABLE) else _FILE


class BaseEntry(NamedTuple):
    """A file, symbolic link or gitlink of the base commit. `size_bytes` is 0 for a gitlink."""

    path: bytes
    mode: bytes
    object_id: bytes
    size_bytes: int


def read_entries(listing: IO[bytes]) -> Iterator[BaseEntry]:
    """The entries in what `git ls-tree -r -l -z` writes. Raises GitError for what no git that is sound would write."""
    rest = b""
    while chunk := listing.read(_CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\0")
        if len(rest) > _CHUNK_BYTES:
            raise GitError(0, b"fatal: a path is too long")
        yield from map(_entry, lines)


def _entry(line: bytes) -> BaseEntry:
    """A repository may have taken git over: then this is whatever it likes, and still is used for paths here."""
    match = _LINE.fullmatch(line)
    if match is None or not {b"", b".", b".."}.isdisjoint(match["path"].split(b"/")):
        raise GitError(0, b"fatal: invalid path in a tree")
    size = match["size"]
    return BaseEntry(match["path"], match["mode"], match["id"], 0 if size == b"-" else int(size))


class BaseTree:
    """All entries by path, and every directory they lie in."""

    def __init__(self, entries: Iterator[BaseEntry]) -> None:
        self.entries: dict[bytes, BaseEntry] = {}
        self.directories: set[bytes] = set()
        path_bytes_left = PATHS_BYTES_MAX
        for number, entry in enumerate(entries):
            path_bytes_left -= len(entry.path)
            # Staging has looked already, but what it saw is another git's word by now.
            if number >= ENTRIES_MAX or path_bytes_left < 0:
                raise GitError(0, b"fatal: the tree is larger than it was")
            self.entries[entry.path] = entry
            self._add_parents(entry.path)

    def _add_parents(self, path: bytes) -> None:
        while path := path.rpartition(b"/")[0]:
            if path in self.directories:
                return
            self.directories.add(path)

    @property
    def ignore_files(self) -> list[BaseEntry]:
        """The `.gitignore` files, which git reads only where they are regular files."""
        named = (entry for entry in self.entries.values() if entry.path.rpartition(b"/")[2] == b".gitignore")
        return [entry for entry in named if entry.mode not in (LINK, GITLINK)]


async def read_base_tree(git: Git, repository: Path, commit: str) -> BaseTree:
    """Read the whole tree of a commit. Raises GitError."""
    with pipe() as (reading, writing):

        def read(stop: Stop) -> BaseTree:
            return BaseTree(read_entries(reading))

        listing = git.run(*list_tree(commit), directory=repository, stdout=writing)
        return await run_with_thread(read, listing)


def list_tree(commit: str) -> tuple[str, ...]:
    """The arguments that make git, in a git directory, list a commit's tree for `read_entries`."""
    return ("--git-dir=.", "ls-tree", "-r", "-l", "-z", "--full-tree", commit)
