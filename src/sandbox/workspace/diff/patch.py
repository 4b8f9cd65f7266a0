"""Writes the agent's changes: a patch, and an archive of the changed files for content that no patch can contain.

git never accesses the workspace. Python code finds the differences between the workspace and the base commit and passes
them to git as a new tree; git compares the two trees. So none of the agent's configuration, attributes, hooks or
filters take effect, and the bytes in the patch are the bytes in the files.
"""

import asyncio
import os
import re
import signal
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.interfaces.workspace import DetectSecret, PatchResult
from sandbox.model.artifacts import DiffStatistics
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import CHANGED_FILES_TAR_BYTES_MAX, PATCH_BYTES_MAX
from sandbox.primitives.concurrency import StopFlag, run_in_thread
from sandbox.primitives.files import create_private_file, fsync_path, remove_on_failure
from sandbox.workspace.diff.base_tree import (
    EXECUTABLE_MODE,
    SYMLINK_MODE,
    BaseTree,
    EmptyIgnoreMatcher,
    git_mode,
    read_base_tree,
)
from sandbox.workspace.diff.comparison import SkippedPaths, TreeComparison, compare_workspace
from sandbox.workspace.git_command import Git, GitError, last_error_line, pipe, wait_for_data, write_all
from sandbox.workspace.rooted_files import Entry, RootedFiles, TooManyEntriesError, printable_path, read_chunks

_SKIPPED_LISTED_MAX = 20
_NEW_TREE_REF = "refs/sandbox/new"
_STALE_LOCK_SUFFIXES = {b"objects/pack": ".keep", _NEW_TREE_REF.rpartition("/")[0].encode(): ".lock"}


async def write_patch_if_unchanged(layout: AttemptLayout, base: BaseTree, target: Path) -> bool:
    """If nothing changed, write an empty patch to `target` without git, and flush it. Returns whether nothing changed.

    Paths that no patch can contain count as changes, and so do ignore rules, which only git evaluates. Raises
    AttemptError (collect_failed).
    """
    if base.ignore_files:
        return False

    def work(stop: StopFlag) -> bool:
        with RootedFiles(layout.workspace) as files:
            comparison = TreeComparison(files, base, EmptyIgnoreMatcher(), _FirstChange(), stop)
            try:
                comparison.run()
            except (_ChangeFoundError, TooManyEntriesError):
                return False
        if not comparison.skipped:
            _write_without_diff(target, b"")
        return not comparison.skipped

    try:
        return await run_in_thread(work)
    except OSError as error:
        raise _patch_failed(error.strerror or str(error)) from error


class _ChangeFoundError(Exception):
    """The workspace differs from the base commit."""


class _FirstChange:
    """Raises _ChangeFoundError for the first difference. Implements `ChangeSink`."""

    def delete(self, path: bytes, *, replaced_link: bool = False) -> None:
        raise _ChangeFoundError

    def put(self, entry: Entry) -> None:
        raise _ChangeFoundError


async def write_patch(
    git: Git,
    layout: AttemptLayout,
    base_commit: str,
    target: Path,
    detect_secret: DetectSecret,
    base: BaseTree | None = None,
) -> PatchResult:
    """Write the patch to `target` and flush it; the file is empty if nothing changed. Raises AttemptError.

    If some changes are omitted, the patch contains only the remaining changes, or only comments. base: the tree of the
    base commit; None if git must list it.
    """
    try:
        base = base or await read_base_tree(git, layout.host_git_directory, base_commit)
        return await _write_patch(git, layout, base_commit, base, target, detect_secret)
    except TooManyEntriesError as error:
        reason: str | None = f"the files that are not ignored exceed a limit: {error}"
    except GitError as error:
        reason = _exceeded_limit(error, git.memory_bytes_max)
        if reason is None:
            raise _patch_failed(f"git reported: {last_error_line(error.stderr)}") from error
    except OSError as error:
        raise _patch_failed(error.strerror or str(error)) from error
    await run_in_thread(lambda _: _write_without_diff(target, f"# truncated: {reason}\n".encode()))
    return PatchResult(reason)


async def _write_patch(
    git: Git, layout: AttemptLayout, base_commit: str, base: BaseTree, target: Path, detect_secret: DetectSecret
) -> PatchResult:
    tree, skipped = await _import_workspace(git, layout, base, base_commit, detect_secret)
    too_large = sorted(tree.too_large)
    preamble = _preamble(skipped, too_large)
    diff: DiffStatistics | None = DiffStatistics(0, 0, 0)
    if tree.is_changed:
        # git cannot apply a patch that renames a symbolic link and creates a directory in its place.
        renames = "--no-renames" if tree.has_replaced_link else "--find-renames"
        await _write_diff(git, layout.host_git_directory, base_commit, target, preamble, renames)
        diff = await _measure_diff(git, layout.host_git_directory, base_commit, renames)
    else:
        await run_in_thread(lambda _: _write_without_diff(target, preamble))
    return PatchResult(_too_large_reason(too_large), tree.contains_secret, None if too_large else diff)


def _too_large_reason(too_large: Sequence[bytes]) -> str | None:
    if not too_large:
        return None
    return (
        f"{len(too_large)} changed files (the first is {printable_path(too_large[0])}) exceed the limit "
        f"of a patch ({PATCH_BYTES_MAX // 1024**2} MiB)"
    )


class FastImportWriter:
    """Writes one commit for `git fast-import`. Contents go through the pipe: git never opens the agent's files.

    too_large: paths whose content exceeded the limit on patches; the commit has their previous content. is_changed:
    whether the commit differs from the base commit; if not, nothing was written. has_replaced_link: whether a directory
    has replaced a symbolic link of the base commit. contains_secret: whether some content contains a secret. The patch
    cannot be checked later: it may be compressed or split into lines.
    """

    def __init__(
        self, files: RootedFiles, stream: IO[bytes], stop: StopFlag, detect_secret: DetectSecret, base_commit: str
    ) -> None:
        self.is_changed = self.has_replaced_link = False
        self.too_large: list[bytes] = []
        self.contains_secret = False
        self._detect_secret = detect_secret
        self._files = files
        self._stream = stream
        self._stop = stop
        self._bytes_left = PATCH_BYTES_MAX
        self._commit_header = (
            b"feature done\ncommit %b\ncommitter Sandbox <sandbox@localhost> 0 +0000\ndata 0\nfrom %b\n"
            % (_NEW_TREE_REF.encode(), base_commit.encode())
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
        self.contains_secret = self.contains_secret or self._detect_secret(chunks)
        for _ in chunks:
            pass
        self._write(b"\n")

    def _write_chunks(self, content: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in content:
            self._write(chunk)
            yield chunk

    def _write_command(self, command: bytes) -> None:
        """Write a command. Before the first command, write the commit's header."""
        if not self.is_changed:
            self._write(self._commit_header)
            self.is_changed = True
        self._write(command)

    def _write(self, data: bytes) -> None:
        write_all(self._stream, data)


def _quote(path: bytes) -> bytes:
    """Quote a path in git's C style, escaping every character that could end the quotes or the line."""
    escaped = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"'


async def _import_workspace(
    git: Git, layout: AttemptLayout, base: BaseTree, base_commit: str, detect_secret: DetectSecret
) -> tuple[FastImportWriter, SkippedPaths]:
    """Import the agent's tree into the host's repository. Returns the import's result and the skipped paths."""
    repository = layout.host_git_directory
    _remove_stale_locks(repository)
    with pipe() as (reader, writer):

        def open_writer(files: RootedFiles, stop: StopFlag) -> FastImportWriter:
            return FastImportWriter(files, writer, stop, detect_secret, base_commit)

        importing = _run_fast_import(git, repository, reader)
        return await compare_workspace(git, layout, base, open_writer, FastImportWriter.finish, importing)


async def _run_fast_import(git: Git, repository: Path, stream: IO[bytes]) -> bytes:
    """Run `git fast-import`. Do nothing if no change was written."""
    with stream:
        if not await wait_for_data(stream):
            return b""
        return await git.run(
            *("--git-dir=.", "-c", "fastimport.unpackLimit=0", "-c", "core.compression=1"),
            *("fast-import", "--quiet", "--force"),
            directory=repository,
            stdin=stream,
        )


def _remove_stale_locks(repository: Path) -> None:
    """Remove lock files left by a git process that was killed together with an earlier runner.

    git locks a new pack until its reference is written.
    """
    with RootedFiles(repository) as files:
        for path, ending in _STALE_LOCK_SUFFIXES.items():
            with suppress(FileNotFoundError), files.open_directory(path) as directory:
                for entry in [*os.scandir(directory)]:
                    if entry.name.endswith(ending):
                        os.unlink(entry.name, dir_fd=directory)


async def _write_diff(
    git: Git, repository: Path, base_commit: str, target: Path, preamble: bytes, renames: str
) -> None:
    with remove_on_failure(target):
        with create_private_file(target) as file:
            file.write(preamble)
            file.flush()
            await git.run(
                *("--git-dir=.", "-c", "core.quotePath=false"),
                *("diff-tree", "-r", "--patch", "--binary", "--full-index", renames),
                *("--no-ext-diff", "--no-textconv", "--no-color", "--no-relative"),
                *("--src-prefix=a/", "--dst-prefix=b/", "--end-of-options", base_commit, _NEW_TREE_REF),
                directory=repository,
                stdout=file,
                file_bytes_max=PATCH_BYTES_MAX,
            )
        await run_in_thread(lambda _: _flush(target))


_STATISTICS = re.compile(rb" (\d+) files? changed(?:, (\d+) insertions?\(\+\))?(?:, (\d+) deletions?\(-\))?\n?")
"""The output of `git diff-tree --shortstat`, which git does not translate."""

_MEASURE_SECONDS = 20.0
"""Time limit for computing the size of a patch, which takes about as long as creating the patch."""


async def _measure_diff(git: Git, repository: Path, base_commit: str, renames: str) -> DiffStatistics | None:
    """Return the size of the patch, or None if git fails or is too slow: the patch is complete without its size."""
    try:
        async with asyncio.timeout(_MEASURE_SECONDS):
            output = await git.run(
                *("--git-dir=.", "diff-tree", "-r", "--shortstat", renames, "--no-ext-diff", "--no-textconv"),
                *("--end-of-options", base_commit, _NEW_TREE_REF),
                directory=repository,
            )
    except (GitError, TimeoutError):
        return None
    match = _STATISTICS.fullmatch(output)
    return DiffStatistics(*(int(count or 0) for count in match.groups())) if match else None


def _preamble(skipped: SkippedPaths, too_large: Sequence[bytes]) -> bytes:
    """List the paths that were left out. `git apply` ignores these lines, because they come before the first diff."""
    lines = [*_comment_lines(skipped), *_comment_lines(dict.fromkeys(too_large, "too large for a patch"))]
    return "".join(lines).encode()


def _comment_lines(paths: SkippedPaths) -> Iterator[str]:
    for path, reason in islice(paths.items(), _SKIPPED_LISTED_MAX):
        yield f"# skipped, {reason}: {printable_path(path)}\n"
    if len(paths) > _SKIPPED_LISTED_MAX:
        yield f"# also skipped: {len(paths) - _SKIPPED_LISTED_MAX} more\n"


def _write_without_diff(target: Path, text: bytes) -> None:
    """Write a patch file that contains only comment lines. Raises OSError."""
    with remove_on_failure(target):
        with create_private_file(target) as file:
            file.write(text)
        _flush(target)


def _flush(target: Path) -> None:
    fsync_path(target)
    fsync_path(target.parent)


def _exceeded_limit(error: GitError, memory_bytes_max: int) -> str | None:
    """Return a message about the limit that stopped git, or None if git was not stopped by a limit."""
    if error.returncode == 128 + signal.SIGXFSZ:
        return f"it exceeds the maximum patch size ({PATCH_BYTES_MAX // 1024**2} MiB)"
    if error.is_out_of_memory:
        return (
            f"git needs over {memory_bytes_max // 1024**2} MiB of memory to compare the files; raise vm.memory (to "
            "4G at most), and add large built or downloaded files to .gitignore"
        )
    return None


def _patch_failed(reason: str) -> AttemptError:
    return AttemptError(FailureCode.COLLECT_FAILED, f"The patch could not be created: {reason}.")


_END_OF_ARCHIVE = b"\0" * 2 * tarfile.BLOCKSIZE


class ChangedFilesTar:
    """Writes a tar of new and changed files and links, without owners and times. The tar does not show deleted files.

    skipped_count: number of files that would have exceeded `bytes_max`.
    """

    def __init__(self, file: IO[bytes], bytes_max: int) -> None:
        self.skipped_count = 0
        self._files: RootedFiles
        self._stop: StopFlag
        self._file = file
        self._bytes_left = bytes_max - len(_END_OF_ARCHIVE)

    def set_source(self, files: RootedFiles, stop: StopFlag) -> "ChangedFilesTar":
        """Read the following entries from `files`."""
        self._files, self._stop = files, stop
        return self

    def delete(self, path: bytes, *, replaced_link: bool = False) -> None:
        """Ignore deleted files. Implements `ChangeSink.delete`."""

    def put(self, entry: Entry) -> None:
        """Add the entry, unless it would exceed the limit. Implements `ChangeSink.put`."""
        member = tarfile.TarInfo(_decode_path(entry.path))
        if entry.is_link:
            member.type, member.linkname = tarfile.SYMTYPE, _decode_path(self._files.read_link(entry.path))
            self._write_header(member)
            return
        with self._files.open_file(entry.path) as (file, size):
            member.size = size
            member.mode = 0o755 if git_mode(entry) == EXECUTABLE_MODE else 0o644
            if self._write_header(member):
                for chunk in read_chunks(file, size, self._stop):
                    self._file.write(chunk)
                self._file.write(b"\0" * (-size % tarfile.BLOCKSIZE))

    def close(self) -> None:
        """Write the end of the archive."""
        self._file.write(_END_OF_ARCHIVE)

    def _write_header(self, member: tarfile.TarInfo) -> bool:
        """Write the header, unless the header and the content would exceed the limit."""
        header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        required_bytes = len(header) + member.size + -member.size % tarfile.BLOCKSIZE
        if required_bytes > self._bytes_left:
            self.skipped_count += 1
            return False
        self._bytes_left -= required_bytes
        self._file.write(header)
        return True


def _decode_path(path: bytes) -> str:
    """Decode with surrogate escapes. In a PAX header, tarfile writes these escapes as the original bytes."""
    return path.decode(errors="surrogateescape")


async def write_changed_files(git: Git, layout: AttemptLayout, base_commit: str, target: Path) -> str | None:
    """Write the complete tar, up to CHANGED_FILES_TAR_BYTES_MAX, and flush it. Raises AttemptError.

    Returns why some changed files are missing, or None. Paths that no patch can contain are always missing.
    """
    try:
        return await _write_archive(git, layout, base_commit, target)
    except GitError as error:
        raise _archive_failed(f"git reported: {last_error_line(error.stderr)}") from error
    except OSError as error:
        raise _archive_failed(error.strerror or str(error)) from error


async def _write_archive(git: Git, layout: AttemptLayout, base_commit: str, target: Path) -> str | None:
    base = await read_base_tree(git, layout.host_git_directory, base_commit)
    reason = None
    with remove_on_failure(target):
        with create_private_file(target) as file:
            tar = ChangedFilesTar(file, CHANGED_FILES_TAR_BYTES_MAX)

            def open_archive(files: RootedFiles, stop: StopFlag) -> ChangedFilesTar:
                return tar.set_source(files, stop)

            try:
                await compare_workspace(git, layout, base, open_archive, lambda _: None)
            except TooManyEntriesError as error:
                reason = f"there are {error}, and the rest were not examined"
            await run_in_thread(lambda _: tar.close())
        await run_in_thread(lambda _: fsync_path(target))
    if tar.skipped_count:
        reason = f"{tar.skipped_count} files would make it larger than {CHANGED_FILES_TAR_BYTES_MAX // 1024**2} MiB"
    return reason


def _archive_failed(reason: str) -> AttemptError:
    return AttemptError(FailureCode.COLLECT_FAILED, f"The changed files could not be stored: {reason}.")
