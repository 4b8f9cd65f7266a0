"""Streams of bytes that a tar is read from: forward only, hashed and bounded."""

import hashlib
from typing import BinaryIO, Protocol

from sandbox.images.definition import IMAGE_METADATA_BYTES_MAX
from sandbox.images.errors import ImageRefusedError

_CHUNK_BYTES = 1024 * 1024


class ByteSource(Protocol):
    """What has bytes to give."""

    def read(self, size: int, /) -> bytes:
        """At most so many; none at the end."""
        ...


class ByteBudget:
    """How many bytes may still come, of several streams together."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_left = bytes_max

    def consume(self, size: int) -> None:
        """Count them. Raises ImageRefusedError past the bound."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise ImageRefusedError("The image is too large once it is uncompressed.")


class HeaderLimit:
    """All that `tarfile` reads of one entry before it tells of it is no more than IMAGE_METADATA_BYTES_MAX.

    How large a header is, and how long the map of a sparse file, stands in the tar itself.
    """

    def __init__(self) -> None:
        self._bytes_left: int | None = IMAGE_METADATA_BYTES_MAX

    def end_header(self) -> None:
        """What is read from here on is an entry's content."""
        self._bytes_left = None

    def start_header(self) -> None:
        """The next entry comes."""
        self._bytes_left = IMAGE_METADATA_BYTES_MAX

    def _count(self, size: int) -> None:
        if self._bytes_left is not None:
            self._bytes_left -= size
        if not 0 <= size <= IMAGE_METADATA_BYTES_MAX or (self._bytes_left or 0) < 0:
            raise ImageRefusedError("The image has a header that is too large.")


class TarStream(HeaderLimit):
    """What `tarfile` takes for a file: it seeks forward only, so that a pipe will do."""

    def __init__(self, source: ByteSource, budget: ByteBudget) -> None:
        super().__init__()
        self._source = source
        self._budget = budget
        self._hash = hashlib.sha256()
        self._position = 0

    def tell(self) -> int:
        """How much was read."""
        return self._position

    def seek(self, position: int) -> int:
        """Skip to a place ahead. Raises ImageRefusedError for one behind."""
        if position < self._position:
            raise ImageRefusedError("The image cannot be read from its beginning to its end.")
        while self._position < position and self._read_part(min(position - self._position, _CHUNK_BYTES)):
            pass
        return self._position

    def seekable(self) -> bool:
        """Ahead at least, which is where `tarfile` goes."""
        return True

    def read(self, size: int) -> bytes:
        """Just so many bytes; fewer at the end only."""
        self._count(size)
        parts, remaining = [], size
        while remaining and (build_directory := self._read_part(remaining)):
            parts.append(build_directory)
            remaining -= len(build_directory)
        return b"".join(parts)

    def read_digest(self) -> str:
        """Read to the end; gives the digest of everything."""
        while self._read_part(_CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}"

    def _read_part(self, size: int) -> bytes:
        build_directory = self._source.read(size)
        self._budget.consume(len(build_directory))
        self._hash.update(build_directory)
        self._position += len(build_directory)
        return build_directory


class HeaderLimitedFile(HeaderLimit):
    """A seekable file that gives no more than IMAGE_METADATA_BYTES_MAX at once."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def seekable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int) -> bytes:
        """At most so many bytes. Raises ImageRefusedError when too many are asked for."""
        self._count(size)
        return self._file.read(size)
