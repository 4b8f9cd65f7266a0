"""The changed files themselves, for what no patch can hold."""

import tarfile
from typing import IO

from sandbox.workspace.base_tree import EXECUTABLE, mode_of
from sandbox.workspace.files import Entry, Files, read_chunks
from sandbox.workspace.stoppable import Stop

_END = b"\0" * 2 * tarfile.BLOCKSIZE


class ChangesTar:
    """Writes a tar of new and changed files and links, without owners and times. What is gone is not in it.

    left_out: how many files would have made it larger than `bytes_max`.
    """

    def __init__(self, file: IO[bytes], bytes_max: int) -> None:
        self.left_out = 0
        self._files: Files
        self._stop: Stop
        self._file = file
        self._bytes_left = bytes_max - len(_END)

    def read_from(self, files: Files, stop: Stop) -> "ChangesTar":
        """Take what is put from here on out of `files`."""
        self._files, self._stop = files, stop
        return self

    def delete(self, path: bytes) -> None:
        """See `Changes.delete`."""

    def put(self, entry: Entry) -> None:
        """See `Changes.put`."""
        member = tarfile.TarInfo(_text(entry.path))
        if entry.is_link:
            member.type, member.linkname = tarfile.SYMTYPE, _text(self._files.read_link(entry.path))
            self._announce(member)
            return
        with self._files.open_file(entry.path) as (file, size):
            member.size = size
            member.mode = 0o755 if mode_of(entry) == EXECUTABLE else 0o644
            if self._announce(member):
                for chunk in read_chunks(file, size, self._stop):
                    self._file.write(chunk)
                self._file.write(b"\0" * (-size % tarfile.BLOCKSIZE))

    def close(self) -> None:
        """Write the end of the archive."""
        self._file.write(_END)

    def _announce(self, member: tarfile.TarInfo) -> bool:
        """Write its header, unless it would be too much with its content."""
        header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        need = len(header) + member.size + -member.size % tarfile.BLOCKSIZE
        if need > self._bytes_left:
            self.left_out += 1
            return False
        self._bytes_left -= need
        self._file.write(header)
        return True


def _text(path: bytes) -> str:
    """A PAX header carries bytes that are no text as they are, when they come this way."""
    return path.decode(errors="surrogateescape")
