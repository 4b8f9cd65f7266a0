"""Forward-only streams that hash the data of a tar and limit its size."""

import hashlib
from typing import BinaryIO, Protocol

from sandbox.images.errors import ImageRefusedError
from sandbox.images.limits import IMAGE_METADATA_BYTES_MAX

_CHUNK_BYTES = 1024 * 1024


class ByteSource(Protocol):
    """A readable source of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; empty at the end."""
        ...


class ByteBudget:
    """The total number of bytes that may still be read from several streams."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_left = bytes_max

    def consume(self, size: int) -> None:
        """Count bytes. Raises ImageRefusedError beyond the limit."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise ImageRefusedError("The image is too large once it is uncompressed.")


class HeaderLimit:
    """Lets `tarfile` read at most IMAGE_METADATA_BYTES_MAX before it returns an entry.

    Without this limit, an untrusted tar could contain a header or a sparse-file map of any size.
    """

    def __init__(self) -> None:
        self._bytes_left: int | None = IMAGE_METADATA_BYTES_MAX

    def end_header(self) -> None:
        """Stop counting: the following reads belong to an entry's content."""
        self._bytes_left = None

    def start_header(self) -> None:
        """Start counting: the following reads belong to the next header."""
        self._bytes_left = IMAGE_METADATA_BYTES_MAX

    def _count(self, size: int) -> None:
        if self._bytes_left is not None:
            self._bytes_left -= size
        if not 0 <= size <= IMAGE_METADATA_BYTES_MAX or (self._bytes_left or 0) < 0:
            raise ImageRefusedError("The image has a header that is too large.")


class TarStream(HeaderLimit):
    """A file object for `tarfile` that seeks forward only, as pipes require."""

    def __init__(self, source: ByteSource, budget: ByteBudget) -> None:
        super().__init__()
        self._source = source
        self._budget = budget
        self._hash = hashlib.sha256()
        self._position = 0

    def tell(self) -> int:
        """Return the number of bytes read."""
        return self._position

    def seek(self, position: int) -> int:
        """Skip forward to a position. Raises ImageRefusedError if the position is before the current one."""
        if position < self._position:
            raise ImageRefusedError("The image cannot be read sequentially.")
        while self._position < position and self._read_part(min(position - self._position, _CHUNK_BYTES)):
            pass
        return self._position

    def seekable(self) -> bool:
        """Return True, because `tarfile` only seeks forward."""
        return True

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes; fewer only at the end."""
        self._count(size)
        parts, remaining = [], size
        while remaining and (chunk := self._read_part(remaining)):
            parts.append(chunk)
            remaining -= len(chunk)
        return b"".join(parts)

    def read_digest(self) -> str:
        """Read to the end and return the digest of the whole stream."""
        while self._read_part(_CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}"

    def _read_part(self, size: int) -> bytes:
        chunk = self._source.read(size)
        self._budget.consume(len(chunk))
        self._hash.update(chunk)
        self._position += len(chunk)
        return chunk


class HeaderLimitedFile(HeaderLimit):
    """A seekable file that returns at most IMAGE_METADATA_BYTES_MAX per read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def seekable(self) -> bool:
        """Return True, because the file is a regular file."""
        return True

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes. Raises ImageRefusedError if `size` is too large."""
        self._count(size)
        return self._file.read(size)
