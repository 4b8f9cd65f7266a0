"""Writes an archive of the changed files, for content that no patch can contain."""

import tarfile
from pathlib import Path
from typing import IO

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import MATCHED_FILES_BYTES_MAX
from sandbox.primitives.durable_files import fsync_path, remove_on_failure
from sandbox.primitives.file_permissions import create_private_file
from sandbox.workspace.cancellable_thread import StopFlag, run_in_thread
from sandbox.workspace.diff.base_commit_tree import EXECUTABLE_MODE, git_mode, read_base_tree
from sandbox.workspace.diff.comparison import compare_workspace
from sandbox.workspace.git.command import Git, GitError
from sandbox.workspace.git.error_messages import last_error_line
from sandbox.workspace.rooted_files import Entry, RootedFiles, TooManyEntriesError, read_chunks

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
    """Write the complete tar, up to half of MATCHED_FILES_BYTES_MAX, and flush it. Raises AttemptError.

    Returns why some changed files are missing, or None.
    """
    try:
        return await _write(git, layout, base_commit, target)
    except GitError as error:
        raise _collect_failed(f"git reported: {last_error_line(error.stderr)}") from error
    except OSError as error:
        raise _collect_failed(error.strerror or str(error)) from error


async def _write(git: Git, layout: AttemptLayout, base_commit: str, target: Path) -> str | None:
    base = await read_base_tree(git, layout.host_git_directory, base_commit)
    reason = None
    with remove_on_failure(target):
        with create_private_file(target) as file:
            tar = ChangedFilesTar(file, MATCHED_FILES_BYTES_MAX // 2)

            def open_archive(files: RootedFiles, stop: StopFlag) -> ChangedFilesTar:
                return tar.set_source(files, stop)

            try:
                await compare_workspace(git, layout, base, open_archive, lambda _: None)
            except TooManyEntriesError as error:
                reason = f"there are {error}, and only the first were examined"
            await run_in_thread(lambda _: tar.close())
        await run_in_thread(lambda _: fsync_path(target))
    if tar.skipped_count:
        reason = f"{tar.skipped_count} files would make it larger than {MATCHED_FILES_BYTES_MAX // 2 // 1024**2} MiB"
    return reason


def _collect_failed(reason: str) -> AttemptError:
    return AttemptError(FailureCode.COLLECT_FAILED, f"The changed files could not be stored: {reason}.")
