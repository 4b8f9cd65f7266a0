"""The agent's tree, told to `git fast-import` as changes to the base commit."""

from collections.abc import Iterable, Iterator
from typing import IO

from sandbox.contracts.workspace import ContainsSecret
from sandbox.model.limits import PATCH_BYTES_MAX
from sandbox.workspace.base_tree import LINK, mode_of
from sandbox.workspace.files import Entry, Files, read_chunks
from sandbox.workspace.pipes import write_all
from sandbox.workspace.stoppable import Stop

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
