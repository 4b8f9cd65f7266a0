"""The tree of the base commit, read from `git ls-tree`, and the import of the agent's tree."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sandbox.interfaces.workspace import FindSecret
from sandbox.model.limits import PATCH_BYTES_MAX
from sandbox.workspace.cancellable_thread import StopFlag
from sandbox.workspace.files import ENTRIES_MAX, PATHS_BYTES_MAX, Entry, RootedFiles, read_chunks
from sandbox.workspace.git.command import Git, GitError, pipe, run_with_thread, write_all

GITLINK_MODE = b"160000"
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
    """Yield the directories of a path, except those that contain `previous`, the path before it in a tree's order."""
    while (path := path.rpartition(b"/")[0]) and not previous.startswith(path + b"/"):
        yield path


class BaseTree:
    """The tree of the base commit: its entries by path, and the directories that contain them."""

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
        """Count a file or directory. Staging did so already, but a git that was compromised later may list more."""
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
        return await run_with_thread(read, listing)


def ls_tree_arguments(commit: str, *options: str) -> tuple[str, ...]:
    """Return the arguments that list a commit's tree, in a git directory, for `parse_ls_tree`."""
    return ("--git-dir=.", "ls-tree", "-r", "-l", "-z", "--full-tree", *options, commit)


NEW_TREE_REF = "refs/sandbox/new"


class FastImportWriter:
    """Writes one commit for `git fast-import`. Contents go through the pipe: git never opens a file of the agent.

    too_large: paths whose content exceeded the limit of a patch; the commit has their previous content. is_changed:
    whether the commit differs from the base commit; if not, nothing was written. has_replaced_link: whether a directory
    is where the base commit has a symbolic link. contains_secret: whether some content contains a secret. The patch
    cannot be checked later: it may be compressed or split into lines.
    """

    def __init__(
        self, files: RootedFiles, stream: IO[bytes], stop: StopFlag, find_secret: FindSecret, base_commit: str
    ) -> None:
        self.is_changed = self.has_replaced_link = False
        self.too_large: list[bytes] = []
        self.contains_secret = False
        self._find_secret = find_secret
        self._files = files
        self._stream = stream
        self._stop = stop
        self._bytes_left = PATCH_BYTES_MAX
        self._commit_header = (
            b"feature done\ncommit %b\ncommitter Sandbox <sandbox@localhost> 0 +0000\ndata 0\nfrom %b\n"
            % (NEW_TREE_REF.encode(), base_commit.encode())
        )

    def finish(self) -> None:
        """Write the end of the stream and close it."""
        if self.is_changed:
            self._write(b"done\n")
        self._stream.close()

    def delete(self, path: bytes, *, replaced_link: bool = False) -> None:
        """Delete a path. Implements `ChangeSink.delete`."""
        self.has_replaced_link = self.has_replaced_link or replaced_link
        self._write_command(b"D %b\n" % _quote(path))

    def put(self, entry: Entry) -> None:
        """Write a file or link, unless it exceeds the limit. Implements `ChangeSink.put`."""
        if entry.is_link:
            target = self._files.read_link(entry.path)
            if self._start_file(SYMLINK_MODE, entry.path, len(target)):
                self._write_content([target])
            return
        with self._files.open_file(entry.path) as (file, size):
            if self._start_file(git_mode(entry), entry.path, size):
                self._write_content(read_chunks(file, size, self._stop))

    def _start_file(self, mode: bytes, path: bytes, size: int) -> bool:
        if size > self._bytes_left:
            self.too_large.append(path)
            return False
        self._bytes_left -= size
        self._write_command(b"M %b inline %b\ndata %d\n" % (mode, _quote(path), size))
        return True

    def _write_content(self, content: Iterable[bytes]) -> None:
        chunks = self._write_chunks(content)
        self.contains_secret = self.contains_secret or self._find_secret(chunks)
        for _ in chunks:
            pass
        self._write(b"\n")

    def _write_chunks(self, content: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in content:
            self._write(chunk)
            yield chunk

    def _write_command(self, command: bytes) -> None:
        """Write a command; the first one is preceded by the commit's header."""
        if not self.is_changed:
            self._write(self._commit_header)
            self.is_changed = True
        self._write(command)

    def _write(self, data: bytes) -> None:
        write_all(self._stream, data)


def _quote(path: bytes) -> bytes:
    """Quote a path in git's C style, with everything escaped that could end the quotes or the line."""
    escaped = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"'
