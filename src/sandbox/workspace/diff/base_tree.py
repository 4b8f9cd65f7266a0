"""The base commit: its tree, read from `git ls-tree`, and its ignore rules, which git itself interprets.

git runs in a directory on the host that contains the base commit's `.gitignore` files and nothing else from the agent
or the repository. Therefore, the agent's `.gitignore` files, `info/exclude` and the excludes of users do not apply. So
a file that only the agent's edited rules ignore is in the patch. A file that the base commit's rules ignore is not,
even if the edited rules no longer ignore it. The edited `.gitignore` is in the patch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from shutil import rmtree
from typing import IO, NamedTuple

from sandbox.primitives.concurrency import StopFlag
from sandbox.workspace.git_command import Git, GitError, pipe, read_exactly, run_thread_with_git, write_all
from sandbox.workspace.rooted_files import ENTRIES_MAX, PATHS_BYTES_MAX, Entry

GITLINK_MODE = b"160000"
TREE_MODE = b"040000"
SYMLINK_MODE = b"120000"
EXECUTABLE_MODE = b"100755"
_REGULAR_FILE_MODE = b"100644"
_LISTING_CHUNK_BYTES = 256 * 1024
_LS_TREE_LINE = re.compile(
    rb"(?P<mode>[0-7]{6}) [a-z]+ (?P<id>[0-9a-f]{40}|[0-9a-f]{64}) +(?P<size>[0-9]{1,18}|-)\t(?P<path>.+)", re.DOTALL
)


def git_mode(entry: Entry) -> bytes:
    """Return the mode that git would record for a file or link in the workspace."""
    if entry.is_link:
        return SYMLINK_MODE
    return EXECUTABLE_MODE if entry.mode & 0o100 else _REGULAR_FILE_MODE


def canonical_mode(mode: bytes) -> bytes:
    """Normalize a mode. Old repositories contain 100664, which git reads as 100644."""
    return mode if mode in (SYMLINK_MODE, EXECUTABLE_MODE) else _REGULAR_FILE_MODE


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
    while chunk := listing.read(_LISTING_CHUNK_BYTES):
        *lines, remaining = (remaining + chunk).split(b"\0")
        if len(remaining) > _LISTING_CHUNK_BYTES:
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


_BATCH_BYTES = 4096
_SET_ASIDE_DIRECTORY = b".git"
"""Name of the directory that contains directories moved aside. No path with this name is queried."""

_DIRECTORY_MODE, _FILE_MODE = 0o755, 0o644
_CHUNK_BYTES = 64 * 1024
_FIELD_BYTES_MAX = 1024 * 1024

IGNORE_FILE_BYTES_MAX = 100 * 1024**2
"""Maximum size of a `.gitignore`. A larger one is ignored, as in git."""

IGNORE_FILES_BYTES_MAX = 1024**3
"""Maximum total size of a commit's `.gitignore` files. Beyond it, the task fails with `collect_failed`."""

IGNORE_ENTRIES_MAX = 100_000
"""Maximum number of a commit's `.gitignore` files and of the directories that contain them.

A small repository can name millions of directories, all of which are created on the server's disk.
"""


class GitIgnoreMatcher:
    """Queries a `git check-ignore` at the other ends of two pipes. A context manager.

    The responses to each batch are read before the next batch is sent. A batch always fits into a pipe, so neither side
    can block the other.

    git checks whether a path is a directory, so queried directories are created for the duration of their batch. They
    are removed after the batch, because the agent may have created a million directories. A directory in place of a
    `.gitignore` is not created, because that path is a file here. Parent directories remain until entries of another
    directory are queried. A directory of the base commit that the agent replaced is moved aside while its path is
    queried. On exit, the directory of the rules has its original content.
    """

    def __init__(self, directory: Path, requests: IO[bytes], responses: IO[bytes]) -> None:
        self._directory = directory
        self._ancestors = _AncestorDirectories(os.fsencode(directory))
        self._requests = requests
        self._fields = _fields(responses)

    def __enter__(self) -> "GitIgnoreMatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._ancestors.move_to(b"")

    def ignored_paths(self, entries: Sequence[Entry]) -> frozenset[bytes]:
        """Return the ignored paths among these untracked entries of one directory.

        Raises OSError; BrokenPipeError if git has ended.
        """
        directories = {
            entry.path for entry in entries if entry.is_directory and b".gitignore" not in entry.path.split(b"/")
        }
        others = {entry.path for entry in entries if not entry.is_directory}
        ignored: set[bytes] = set()
        if directories:
            self._ancestors.move_to(next(iter(directories)).rpartition(b"/")[0])
        for page in _batches(entries):
            with (
                _temporary_directories(self._directory, directories.intersection(page)),
                _set_aside(self._directory, others.intersection(page)),
            ):
                ignored.update(self._query(page))
        return frozenset(ignored)

    def _query(self, batch: Sequence[bytes]) -> Iterator[bytes]:
        # "./" prevents names such as ":(top)x" from being parsed as pathspec magic.
        write_all(self._requests, b"".join(b"./" + path + b"\0" for path in batch))
        for path in batch:
            _source, _line, pattern, _path = (next(self._fields) for _ in range(4))
            if pattern and not pattern.startswith(b"!"):
                yield path


class EmptyIgnoreMatcher:
    """Matches nothing. Used if the base commit has no `.gitignore`: there are no other rules, so git is not started."""

    def ignored_paths(self, entries: Sequence[Entry]) -> frozenset[bytes]:
        """Return an empty set."""
        return frozenset()


def _batches(entries: Sequence[Entry]) -> Iterator[list[bytes]]:
    page: list[bytes] = []
    size = 0
    for entry in entries:
        query_bytes = len(entry.path) + len(b"./\0")
        if page and size + query_bytes > _BATCH_BYTES:
            yield page
            page, size = [], 0
        page.append(entry.path)
        size += query_bytes
    if page:
        yield page


def _fields(responses: IO[bytes]) -> Iterator[bytes]:
    remaining = b""
    while chunk := responses.read(_CHUNK_BYTES):
        *fields, remaining = (remaining + chunk).split(b"\0")
        if len(remaining) > _FIELD_BYTES_MAX:
            raise BrokenPipeError("git check-ignore wrote too much output")
        yield from fields
    raise BrokenPipeError("git check-ignore ended early")


class _AncestorDirectories:
    """Creates a directory under `root` and its missing parents. On exit, removes the directories that it created.

    All entries of one directory are queried before the next, so each directory is created about once, however deep it
    is.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._names: list[bytes] = []
        self._created: list[bytes] = []

    def move_to(self, path: bytes) -> None:
        names = path.split(b"/") if path else []
        pairs = zip(self._names, names, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        while self._created and self._created[-1].count(b"/") >= shared:
            os.rmdir(os.path.join(self._root, self._created.pop()))  # noqa: PTH106, PTH118 (bytes)
        for end in range(shared + 1, len(names) + 1):
            directory = b"/".join(names[:end])
            if _make_directory(os.path.join(self._root, directory)):  # noqa: PTH118 (bytes)
                self._created.append(directory)
        self._names = names


@contextmanager
def _temporary_directories(root: Path, paths: Iterable[bytes]) -> Iterator[None]:
    """Create missing directories for the duration of the block. Their parents must exist."""
    created: list[bytes] = []
    try:
        for path in paths:
            directory = os.path.join(os.fsencode(root), path)  # noqa: PTH118 (bytes)
            if _make_directory(directory):
                created.append(directory)
        yield
    finally:
        for directory in reversed(created):
            os.rmdir(directory)  # noqa: PTH106 (bytes)


@contextmanager
def _set_aside(root: Path, paths: Iterable[bytes]) -> Iterator[None]:
    """Move the directories that exist at `paths` away for the duration of the block."""
    renamed: list[tuple[bytes, bytes]] = []
    aside = os.path.join(os.fsencode(root), _SET_ASIDE_DIRECTORY)  # noqa: PTH118 (bytes)
    try:
        for path in paths:
            source = os.path.join(os.fsencode(root), path)  # noqa: PTH118 (bytes)
            if os.path.isdir(source):  # noqa: PTH112 (bytes)
                backup = os.path.join(aside, b"%d" % len(renamed))  # noqa: PTH118 (bytes)
                os.makedirs(aside, _DIRECTORY_MODE, exist_ok=True)  # noqa: PTH103 (bytes)
                os.rename(source, backup)  # noqa: PTH104 (bytes)
                renamed.append((backup, source))
        yield
    finally:
        for backup, source in renamed:
            os.rename(backup, source)  # noqa: PTH104 (bytes)
        if renamed:
            os.rmdir(aside)  # noqa: PTH106 (bytes)


def _make_directory(path: bytes) -> bool:
    """Create a directory that git's kernel uid can access. Returns False if it existed."""
    try:
        os.mkdir(path)  # noqa: PTH102 (bytes)
    except FileExistsError:
        return False
    os.chmod(path, _DIRECTORY_MODE)  # noqa: PTH101 (bytes)
    return True


def create_rules_directory(directory: Path) -> None:
    """Create the directory, or replace it with an empty one. Raises OSError."""
    if directory.exists():
        rmtree(directory, ignore_errors=True)
    directory.mkdir()
    directory.chmod(_DIRECTORY_MODE)


async def write_ignore_files(git: Git, repository: Path, entries: Sequence[BaseTreeEntry], directory: Path) -> None:
    """Write the base commit's `.gitignore` files into the empty `directory`. Raises GitError, OSError."""
    applied = [entry for entry in entries if entry.size_bytes <= IGNORE_FILE_BYTES_MAX]
    if sum(entry.size_bytes for entry in applied) > IGNORE_FILES_BYTES_MAX:
        raise GitError(0, b"fatal: the total size of the .gitignore files is too large")
    if count_created_entries(applied) > IGNORE_ENTRIES_MAX:
        raise GitError(0, b"fatal: there are too many .gitignore files")
    if not applied:
        return
    with pipe() as (request_reader, request_writer), pipe() as (response_reader, response_writer):

        def write(stop: StopFlag) -> None:
            for entry in applied:
                stop.raise_if_requested()
                write_all(request_writer, entry.object_id + b"\n")
                _write_ignore_file(directory, entry, response_reader)
            request_writer.close()

        contents = git.run(
            *("--git-dir=.", "cat-file", "--batch=%(objectsize)"),
            directory=repository,
            stdin=request_reader,
            stdout=response_writer,
        )
        await run_thread_with_git(write, contents)


def count_created_entries(entries: Sequence[BaseTreeEntry]) -> int:
    """Return the number of files and directories that `write_ignore_files` creates. Unsorted entries count as more."""
    paths = (b"", *(entry.path for entry in entries))
    return sum(1 + len([*new_directories(path, previous)]) for previous, path in pairwise(paths))


def _write_ignore_file(directory: Path, entry: BaseTreeEntry, contents: IO[bytes]) -> None:
    read_exactly(contents, len(b"%d\n" % entry.size_bytes))
    *parents, name = entry.path.split(b"/")
    root_bytes = os.fsencode(directory)
    for parent in parents:
        root_bytes = os.path.join(root_bytes, parent)  # noqa: PTH118 (bytes)
        _make_directory(root_bytes)
    with open(os.path.join(root_bytes, name), "xb") as file:  # noqa: PTH118, PTH123 (bytes)
        os.fchmod(file.fileno(), _FILE_MODE)
        remaining = entry.size_bytes
        while remaining:
            chunk = read_exactly(contents, min(remaining, _CHUNK_BYTES))
            file.write(chunk)
            remaining -= len(chunk)
    read_exactly(contents, 1)
