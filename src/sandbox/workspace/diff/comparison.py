"""Finds the agent's changes by walking the workspace alongside the tree of the base commit."""

import hashlib
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.primitives.concurrency import StopFlag
from sandbox.workspace.diff.base_tree import (
    GITLINK_MODE,
    SYMLINK_MODE,
    BaseTree,
    BaseTreeEntry,
    EmptyIgnoreMatcher,
    GitIgnoreMatcher,
    canonical_mode,
    git_mode,
    write_ignore_files,
)
from sandbox.workspace.git_command import Git, pipe, run_thread_with_git
from sandbox.workspace.rooted_files import Entry, RootedFiles, read_chunks

_GITMODULES_HASHED_SHORT_NAME = "gi7eba"
_SHORT_NAMES = "|".join(
    f"{_GITMODULES_HASHED_SHORT_NAME[:length]}~[1-9][0-9]{{{6 - length}}}"
    for length in range(len(_GITMODULES_HASHED_SHORT_NAME) + 1)
)
_NTFS_GIT = re.compile(rb"(?:^|/|[^/]\\)(?:\.git|git~1)[ .]*(?:[:/\\]|\Z)", re.IGNORECASE)
_NTFS_GITMODULES = re.compile(
    rf"(?:^|/|[^/]\\)(?:\.gitmodules|gitmod~[1-4]|{_SHORT_NAMES})[ .]*(?::|\Z)".encode(), re.IGNORECASE
)
# git treats a byte that is not UTF-8 as the end of a name here.
_HFS_GIT = re.compile(r"(?:^|/)\.git(?:[/\udc80-\udcff]|\Z)", re.IGNORECASE | re.ASCII)
_HFS_GITMODULES = re.compile(r"(?:^|/)\.gitmodules(?:[/\udc80-\udcff]|\Z)", re.IGNORECASE | re.ASCII)
_HFS_IGNORED_CHARACTERS = re.compile(r"[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


def is_forbidden_path(path: bytes, *, is_link: bool) -> bool:
    """Return whether git rejects the path, here or on the machine where the patch is applied."""
    visible_path = _HFS_IGNORED_CHARACTERS.sub("", path.decode(errors="surrogateescape"))
    if _NTFS_GIT.search(path) or _HFS_GIT.search(visible_path):
        return True
    return is_link and bool(_NTFS_GITMODULES.search(path) or _HFS_GITMODULES.search(visible_path))


class ChangeSink(Protocol):
    """Receives every difference, in the order of the walk. Methods raise OSError, WorkStoppedError."""

    def delete(self, path: bytes, *, replaced_link: bool = False) -> None:
        """Record that a file, link or gitlink of the base commit is gone.

        replaced_link: it was a symbolic link, which a directory has replaced.
        """
        ...

    def put(self, entry: Entry) -> None:
        """Record that a file or symbolic link is new or has a different content or mode."""
        ...


class IgnoreMatcher(Protocol):
    """The ignore rules of the base commit."""

    def ignored_paths(self, entries: Sequence[Entry]) -> frozenset[bytes]:
        """Return the ignored paths among these untracked entries of one directory. Raises OSError."""
        ...


class TreeComparison:
    """One comparison. Files of the base commit are always compared, other files only if no rule ignores them.

    Only the working tree counts: the agent's commits, branches and stashes are in its `.git`, which is not read. A
    nested repository counts as ordinary files without its `.git`. A gitlink of the base commit counts as unchanged as
    long as its path is a directory; a patch cannot contain the content of that directory. FIFOs, sockets and devices
    are omitted, because git does not support them. `skipped` contains the paths that no patch can contain, such as
    forbidden names or paths that are too long, each with the reason.
    """

    def __init__(
        self, files: RootedFiles, base: BaseTree, ignore_matcher: IgnoreMatcher, sink: ChangeSink, stop: StopFlag
    ) -> None:
        self._files = files
        self._base = base
        self._ignore_matcher = ignore_matcher
        self._sink = sink
        self._stop = stop
        self._missing = dict.fromkeys(base.entries)
        self.skipped: dict[bytes, str] = {}

    def run(self) -> None:
        """Report every difference to the sink. Raises OSError, TooManyEntriesError, WorkStoppedError."""
        pending = [b""]
        while pending:
            pending += self._compare_directory(pending.pop())
        for path in self._missing:
            self._sink.delete(path)

    def _compare_directory(self, directory: bytes) -> list[bytes]:
        """Compare one directory. Returns the subdirectories to visit."""
        self._stop.raise_if_requested()
        entries = [entry for entry in self._files.entries(directory) if self._is_includable(entry)]
        ignored = self._ignore_matcher.ignored_paths([entry for entry in entries if not self._is_tracked(entry)])
        visited = [entry for entry in entries if entry.path not in ignored]
        for entry in visited:
            self._compare_entry(entry)
        return [entry.path for entry in visited if entry.is_directory and not self._is_gitlink(entry)]

    def _is_includable(self, entry: Entry) -> bool:
        if entry.path == b".git":
            return False
        if is_forbidden_path(entry.path, is_link=entry.is_link):
            self.skipped[entry.path] = "git does not support this path"
        elif not entry.is_within_limits:
            self.skipped[entry.path] = "the path is too long or too deep"
        return entry.path not in self.skipped

    def _is_tracked(self, entry: Entry) -> bool:
        if entry.is_directory:
            return entry.path in self._base.directories or self._is_gitlink(entry)
        return entry.path in self._base.entries

    def _is_gitlink(self, entry: Entry) -> bool:
        base = self._base.entries.get(entry.path)
        return base is not None and base.mode == GITLINK_MODE

    def _compare_entry(self, entry: Entry) -> None:
        base = self._base.entries.get(entry.path)
        if entry.is_directory:
            if base is not None:
                self._replace_by_directory(entry)
        elif entry.is_file or entry.is_link:
            self._missing.pop(entry.path, None)
            if base is None or base.mode == GITLINK_MODE or not self._is_same(entry, base):
                self._sink.put(entry)

    def _replace_by_directory(self, entry: Entry) -> None:
        del self._missing[entry.path]
        if not self._is_gitlink(entry):
            # Report the deletion before the directory's content, which a later deletion would remove too.
            self._sink.delete(entry.path, replaced_link=self._base.entries[entry.path].mode == SYMLINK_MODE)

    def _is_same(self, entry: Entry, base: BaseTreeEntry) -> bool:
        if git_mode(entry) != canonical_mode(base.mode):
            return False
        if entry.is_link:
            target = self._files.read_link(entry.path)
            return _blob_id(base, len(target), [target]) == base.object_id
        with self._files.open_file(entry.path) as (file, size):
            # Compare sizes first: a file of a different size, for example a huge sparse file, is not read at all.
            return (
                size == base.size_bytes and _blob_id(base, size, read_chunks(file, size, self._stop)) == base.object_id
            )


def _blob_id(base: BaseTreeEntry, size: int, chunks: Iterable[bytes]) -> bytes:
    """Return git's object id of a blob, computed with the hash function of the base commit's repository."""
    algorithm = hashlib.sha1 if len(base.object_id) == 40 else hashlib.sha256
    digest = algorithm(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest().encode()


T = TypeVar("T")
C = TypeVar("C", bound=ChangeSink)
SkippedPaths = Mapping[bytes, str]
"""Paths, and why no patch can contain them."""


async def compare_workspace(
    git: Git,
    layout: AttemptLayout,
    base: BaseTree,
    open_sink: Callable[[RootedFiles, StopFlag], C],
    close_sink: Callable[[C], None],
    *background: Coroutine[Any, Any, bytes],
) -> tuple[C, SkippedPaths]:
    """Walk the workspace in a thread and report changes to the sink from `open_sink`. `background` runs concurrently.

    The directory of the ignore rules must exist and be empty. Returns the sink, and the skipped paths in order. Raises
    GitError, OSError, TooManyEntriesError.
    """
    try:
        await write_ignore_files(git, layout.host_git_directory, base.ignore_files, layout.ignore_rules)
    except BaseException:
        for waiting in background:
            waiting.close()
        raise

    def walk(stop: StopFlag, ignore_matcher: IgnoreMatcher) -> tuple[C, SkippedPaths]:
        with RootedFiles(layout.workspace) as files:
            changes = open_sink(files, stop)
            comparison = TreeComparison(files, base, ignore_matcher, changes, stop)
            comparison.run()
            close_sink(changes)
            return changes, dict(sorted(comparison.skipped.items()))

    if not base.ignore_files:
        return await run_thread_with_git(lambda stop: walk(stop, EmptyIgnoreMatcher()), *background)
    return await _walk_with_ignore_rules(walk, git, layout, background)


async def _walk_with_ignore_rules(
    walk: Callable[[StopFlag, IgnoreMatcher], T],
    git: Git,
    layout: AttemptLayout,
    background: Sequence[Coroutine[Any, Any, bytes]],
) -> T:
    """Walk with a `git check-ignore` that evaluates the base commit's ignore rules."""
    with pipe() as (request_reader, request_writer), pipe() as (response_reader, response_writer):

        def work(stop: StopFlag) -> T:
            with request_writer, GitIgnoreMatcher(layout.ignore_rules, request_writer, response_reader) as matcher:
                return walk(stop, matcher)

        check_ignore = git.run(
            *(f"--git-dir=../{layout.host_git_directory.name}", "--work-tree=."),
            *("check-ignore", "--no-index", "--stdin", "-z", "--verbose", "--non-matching"),
            directory=layout.ignore_rules,
            stdin=request_reader,
            stdout=response_writer,
            ok_exit_codes=(0, 1),
        )
        return await run_thread_with_git(work, *background, check_ignore)
