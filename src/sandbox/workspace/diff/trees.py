"""The tree of the base commit, as `git ls-tree` tells it."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.interfaces.workspace import ContainsSecret
from sandbox.model.limits import PATCH_BYTES_MAX
from sandbox.workspace.cancellable_thread import Stop
from sandbox.workspace.files import ENTRIES_MAX, PATHS_BYTES_MAX, Entry, Files, read_chunks
from sandbox.workspace.git.command import Git, GitError, pipe, run_with_thread, write_all

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


NEW_TREE_REF = "refs/sandbox/new"


class NewTree:
    """Writes one commit. Contents go through the pipe: git never opens a file of the agent's.

    too_large: paths whose content did not fit into what a patch may hold; the commit has them as they were before.
    is_changed: whether there is anything in it that the base commit does not have; else nothing was written.
    contains_secret: whether some content holds a value: compressed, or line by line, nobody finds it again.
    """

    def __init__(
        self, files: Files, stream: IO[bytes], stop: Stop, contains_secret: ContainsSecret, base_commit: str
    ) -> None:
        self.is_changed = False
        self.too_large: list[bytes] = []
        self.contains_secret = False
        self._looks = contains_secret
        self._files = files
        self._stream = stream
        self._stop = stop
        self._bytes_left = PATCH_BYTES_MAX
        self._beginning = (
            b"feature done\ncommit %b\ncommitter Sandbox <sandbox@localhost> 0 +0000\ndata 0\nfrom %b\n"
            % (NEW_TREE_REF.encode(), base_commit.encode())
        )

    def end(self) -> None:
        """Everything has been told."""
        if self.is_changed:
            self._write(b"done\n")
        self._stream.close()

    def delete(self, path: bytes) -> None:
        """See `Changes.delete`."""
        self._change(b"D %b\n" % _quote(path))

    def put(self, entry: Entry) -> None:
        """See `Changes.put`."""
        if entry.is_link:
            target = self._files.read_link(entry.path)
            if self._announce(LINK, entry.path, len(target)):
                self._tell([target])
            return
        with self._files.open_file(entry.path) as (file, size):
            if self._announce(mode_of(entry), entry.path, size):
                self._tell(read_chunks(file, size, self._stop))

    def _announce(self, mode: bytes, path: bytes, size: int) -> bool:
        if size > self._bytes_left:
            self.too_large.append(path)
            return False
        self._bytes_left -= size
        self._change(b"M %b inline %b\ndata %d\n" % (mode, _quote(path), size))
        return True

    def _tell(self, content: Iterable[bytes]) -> None:
        told = self._told(content)
        self.contains_secret = self.contains_secret or self._looks(told)
        for _ in told:
            pass
        self._write(b"\n")

    def _told(self, content: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in content:
            self._write(chunk)
            yield chunk

    def _change(self, command: bytes) -> None:
        """From the base commit's tree on."""
        if not self.is_changed:
            self._write(self._beginning)
            self.is_changed = True
        self._write(command)

    def _write(self, data: bytes) -> None:
        write_all(self._stream, data)


def _quote(path: bytes) -> bytes:
    """A path in git's C style: always in quotes, with everything escaped that could end them or the line."""
    escaped = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"'
