"""Reads tars with limited sizes, and applies a layer of an image: a tar that is extracted over the earlier layers."""

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, Protocol, cast

from sandbox.images.limits import IMAGE_METADATA_BYTES_MAX
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.interfaces.images import ImageRefusedError

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


_WHITEOUT = ".wh."
_OPAQUE_WHITEOUT = ".wh..wh..opq"
_RESERVED_PREFIX = ".wh..wh."
_GLOBAL_HEADERS_MAX = 100


def apply_layer(stream: TarStream, rootfs: RootFsWriter, *, has_whiteouts: bool = True) -> str:
    """Apply a layer. Returns the digest of the stream.

    has_whiteouts: names that start with `.wh.` remove files of earlier layers. Otherwise they are ordinary names.

    Owners and permissions are normalized: files are readable by everybody and writable by their owner, and have no
    setuid bits or capabilities.
    Devices and pipes are skipped, because the runtime creates /dev. Raises ImageRefusedError, or OSError if the disk is
    full.
    """
    rootfs.start_layer()
    with converting_tar_errors(), tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:") as tar:
        while (member := tar.next()) is not None:
            stream.end_header()
            check_global_headers(tar)
            cast("Any", tar).members.clear()  # otherwise tarfile would keep up to a million members
            if not (has_whiteouts and _apply_whiteout(member.name, rootfs)):
                _apply_member(tar, member, rootfs)
            stream.start_header()
    return stream.read_digest()


def check_global_headers(tar: tarfile.TarFile) -> None:
    """Check the global headers, which accumulate over all entries. Raises ImageRefusedError."""
    words = tar.pax_headers
    if len(words) > _GLOBAL_HEADERS_MAX or sum(map(len, words.values())) > IMAGE_METADATA_BYTES_MAX:
        raise ImageRefusedError(
            f"The image has more than {_GLOBAL_HEADERS_MAX} pax global headers, or they are larger than "
            f"{IMAGE_METADATA_BYTES_MAX // 1024**2} MiB."
        )


@contextmanager
def converting_tar_errors() -> Iterator[None]:
    """Convert errors of `tarfile` for invalid data to ImageRefusedError."""
    try:
        yield
    except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        raise ImageRefusedError(f"The image is damaged: {str(error)[:200] or type(error).__name__}.") from error


def _apply_member(tar: tarfile.TarFile, member: tarfile.TarInfo, rootfs: RootFsWriter) -> None:
    name = member.name
    if member.isdir():
        rootfs.add_directory(name)
    elif member.issym():
        rootfs.add_link(name, member.linkname)
    elif member.islnk():
        rootfs.add_hard_link(name, member.linkname)
    elif member.isreg():
        content: Any = tar.extractfile(member)
        is_executable = bool(member.mode & 0o111)
        rootfs.add_file(name, content, member.size, is_executable=is_executable, mtime=member.mtime)
    elif not member.isdev():
        raise ImageRefusedError(f"The image has an entry of unknown type: {name[:200]}")


def _apply_whiteout(name: str, rootfs: RootFsWriter) -> bool:
    """Apply an entry if it is a whiteout. Returns whether it is one. Raises ImageRefusedError."""
    base = name.rstrip("/").rpartition("/")[2]
    if not base.startswith(_WHITEOUT):
        return False
    parent = name.rstrip("/").removesuffix(base)
    if base == _OPAQUE_WHITEOUT:
        rootfs.apply_opaque_whiteout(parent)
    elif not base.startswith(_RESERVED_PREFIX):
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in {"", "."}:
            raise ImageRefusedError(f"The image has a whiteout without a name: {name[:200]}")
        rootfs.apply_whiteout(parent + hidden)
    return True
