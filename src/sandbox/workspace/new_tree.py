"""The agent's tree, told to `git fast-import` as changes to the base commit."""

import hashlib
from collections.abc import Iterable
from typing import IO

from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import PATCH_BYTES_MAX
from sandbox.workspace.base_tree import EXECUTABLE, LINK, BaseEntry
from sandbox.workspace.files import Entry, Files, read_chunks
from sandbox.workspace.pipes import write_all
from sandbox.workspace.stoppable import Stop
from sandbox.workspace.visible_path import show

NEW_TREE_REF = "refs/sandbox/new"
_FILE = b"100644"


class NewTree:
    """Writes one commit. Contents go through the pipe: git never opens a file of the agent's."""

    def __init__(self, files: Files, stream: IO[bytes], stop: Stop) -> None:
        self._files = files
        self._stream = stream
        self._stop = stop
        self._bytes_left = PATCH_BYTES_MAX

    def begin(self, base_commit: str) -> None:
        """Start from the base commit's tree."""
        self._write(
            b"feature done\ncommit %b\ncommitter Sandbox <sandbox@localhost> 0 +0000\ndata 0\nfrom %b\n"
            % (NEW_TREE_REF.encode(), base_commit.encode())
        )

    def end(self) -> None:
        """Everything has been told."""
        self._write(b"done\n")
        self._stream.close()

    def delete(self, path: bytes) -> None:
        """The file, link or gitlink is gone."""
        self._write(b"D %b\n" % _quote(path))

    def put(self, entry: Entry) -> None:
        """A file or symbolic link, as it is in the workspace. Raises AttemptError past the bound of a patch."""
        if entry.is_link:
            target = self._files.read_link(entry.path)
            self._announce(LINK, entry.path, len(target))
            self._write(target + b"\n")
        else:
            self._put_file(entry)

    def put_if_changed(self, entry: Entry, base: BaseEntry) -> None:
        """The same for a path of the base commit; says nothing when content and mode are the same."""
        if _mode(entry) == _canonical(base.mode) and self._has_content_of(entry, base):
            return
        self.put(entry)

    def _put_file(self, entry: Entry) -> None:
        with self._files.open_file(entry.path) as (file, size):
            self._announce(_mode(entry), entry.path, size)
            for chunk in read_chunks(file, size, self._stop):
                self._write(chunk)
        self._write(b"\n")

    def _announce(self, mode: bytes, path: bytes, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise AttemptError(
                FailureCode.COLLECT_FAILED,
                f"What the agent changed is larger than a patch may be ({PATCH_BYTES_MAX // 1024**2} MiB), with "
                f"{show(path)} ({size} bytes) among it; have what is built or downloaded ignored in .gitignore.",
            )
        self._write(b"M %b inline %b\ndata %d\n" % (mode, _quote(path), size))

    def _has_content_of(self, entry: Entry, base: BaseEntry) -> bool:
        if entry.is_link:
            target = self._files.read_link(entry.path)
            return _blob_name(base, len(target), [target]) == base.object_id
        with self._files.open_file(entry.path) as (file, size):
            # Sizes first: what is of another size, such as a huge sparse file, is not read at all.
            return (
                size == base.size_bytes
                and _blob_name(base, size, read_chunks(file, size, self._stop)) == base.object_id
            )

    def _write(self, data: bytes) -> None:
        write_all(self._stream, data)


def _blob_name(base: BaseEntry, size: int, chunks: Iterable[bytes]) -> bytes:
    """Git's name of a blob, in the hash function of the base commit's repository."""
    algorithm = hashlib.sha1 if len(base.object_id) == 40 else hashlib.sha256
    digest = algorithm(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest().encode()


def _mode(entry: Entry) -> bytes:
    if entry.is_link:
        return LINK
    return EXECUTABLE if entry.stat.st_mode & 0o100 else _FILE


def _canonical(mode: bytes) -> bytes:
    """Old repositories have 100664, which git reads as 100644."""
    return mode if mode in (LINK, EXECUTABLE) else _FILE


def _quote(path: bytes) -> bytes:
    """A path in git's C style: always in quotes, with everything escaped that could end them or the line."""
    escaped = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"'
