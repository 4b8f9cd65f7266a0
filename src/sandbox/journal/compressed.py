"""Compressed journals of finished tasks: gzip files with random access.

A file is a series of gzip members. Each member contains whole records of about MEMBER_BYTES in total. The extra field
of a member's header contains the member's first record number and its compressed and uncompressed sizes. A reader skips
from header to header and decompresses only one member. `zcat` and `zgrep` ignore the extra field.
"""

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache, reduce
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError
from sandbox.journal import record_format
from sandbox.journal.reader import find_journal_end, iter_lines
from sandbox.model.events import TaskFinished
from sandbox.primitives.files import fsync_path

MEMBER_BYTES = 256 * 1024
"""Uncompressed size of a member. Reading any record decompresses the whole member."""

_HEADER = struct.Struct("<4sIBBH2sHQII")
_HEADER_CRC = struct.Struct("<H")
_HEADER_BYTES = _HEADER.size + _HEADER_CRC.size
_HEADER_START = (b"\x1f\x8b\x08\x06", 0, 0, 255, 20, b"SB", 16)
_TRAILER = struct.Struct("<II")
_CACHED_FILES_MAX = 64


class GzipMember(NamedTuple):
    """One gzip member: its first record, and its positions in the uncompressed journal and in the file."""

    first_seq: int
    offset: int
    size_bytes: int
    file_offset: int
    compressed_bytes: int


class CompressedJournal:
    """An open compressed journal. Reading raises JournalDamagedError if the data is damaged."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises FileNotFoundError, JournalDamagedError."""
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(self._fd)
            self._members = _read_members(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "CompressedJournal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def size_bytes(self) -> int:
        """Size of the uncompressed journal."""
        return self._members[-1].offset + self._members[-1].size_bytes if self._members else 0

    def lines(self, offset: int, bytes_max: int) -> list[bytes]:
        """Return the lines from `offset` that end within `bytes_max`, or only the first line if it is longer.

        All returned lines are in one member.
        """
        if offset == self.size_bytes:
            return []
        member = self._find_member(offset, attrgetter("offset"))
        if member is None or offset > self.size_bytes:
            raise JournalOffsetError(
                f"No record ends at byte {offset} of {self._path}; read the journal from its start."
            )
        begin = offset - member.offset
        data = self._decompress(member)
        if begin and data[begin - 1 : begin] != b"\n":
            raise JournalOffsetError(
                f"No record ends at byte {offset} of {self._path}; read the journal from its start."
            )
        end = data.rfind(b"\n", begin, begin + bytes_max) + 1 or data.find(b"\n", begin) + 1
        return [text + b"\n" for text in data[begin : end - 1].split(b"\n")]

    def find_offset(self, seq: int) -> int:
        """Return the offset of record `seq`, or the end of the last record."""
        member = self._find_member(seq, attrgetter("first_seq"))
        if member is None:
            return 0
        offset = member.offset
        for text in self._decompress(member).splitlines(keepends=True):
            if record_format.seq_of(text) >= seq:
                return offset
            offset += len(text)
        return offset

    def iter_content(self) -> Iterator[bytes]:
        """Yield the uncompressed content, member by member."""
        return map(self._decompress, self._members)

    def _find_member(self, value: int, key: "attrgetter[int]") -> GzipMember | None:
        index = bisect_right(self._members, value, key=key) - 1
        return self._members[index] if index >= 0 else None

    def _decompress(self, member_info: GzipMember) -> bytes:
        member = os.pread(self._fd, member_info.compressed_bytes, member_info.file_offset)
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpacking.decompress(member[_HEADER_BYTES : -_TRAILER.size], member_info.size_bytes + 1)
        except zlib.error as error:
            raise _damage_error(self._path, member_info.file_offset) from error
        is_intact = (
            len(member) == member_info.compressed_bytes and data.endswith(b"\n") and len(data) == member_info.size_bytes
        )
        if not is_intact or member[-_TRAILER.size :] != _TRAILER.pack(zlib.crc32(data), len(data)):
            raise _damage_error(self._path, member_info.file_offset)
        return data


def compress_journal(records_path: Path, target: Path) -> None:
    """Replace a plain journal, whose lock the caller holds, with a compressed one. A torn tail is dropped.

    The compressed file is written under a temporary name, read back, compared and renamed; then the plain file is
    removed. A crash leaves at least one of the files intact, and the next attempt starts over. After an error, the
    partial file is removed, because the disk may be full. Raises OSError; FileNotFoundError if neither file exists;
    JournalDamagedError, even for a journal without a final record, because none can be appended after compression.
    """
    temporary = target.with_name(f"{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        journal_end = find_journal_end(records_path)
    except FileNotFoundError:
        target.stat()
        return
    if journal_end.last_record is None or not isinstance(journal_end.last_record.event, TaskFinished):
        message = f"{records_path} has no record of the task's end; stop the server and run: sandbox admin rebuild"
        raise JournalDamagedError(message)
    try:
        _write_verified(_lines_before(records_path, journal_end.end_offset), temporary)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(target)
    fsync_path(target.parent)
    records_path.unlink()
    fsync_path(target.parent)


def _lines_before(records_path: Path, end: int) -> Iterator[bytes]:
    return (text for offset, text in iter_lines(records_path) if offset < end)


def _write_verified(texts: Iterable[bytes], target: Path) -> None:
    checksum = _write_members(texts, target)
    with CompressedJournal(target) as written:
        if reduce(lambda value, data: zlib.crc32(data, value), written.iter_content(), 0) != checksum:
            raise JournalDamagedError(f"{target} differs from the written data; check the disk.")


def _write_members(texts: Iterable[bytes], target: Path) -> int:
    """Write a new file and flush it to disk; return the CRC-32 of all lines."""
    checksum = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(target, flags, 0o600), "wb") as file:
        for data in _in_chunks(texts):
            checksum = zlib.crc32(data, checksum)
            file.write(_encode_member(data))
        file.flush()
        os.fsync(file.fileno())
    return checksum


def _in_chunks(texts: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    size_bytes = 0
    for text in texts:
        if waiting and size_bytes + len(text) > MEMBER_BYTES:
            yield b"".join(waiting)
            waiting, size_bytes = [], 0
        waiting.append(text)
        size_bytes += len(text)
    if waiting:
        yield b"".join(waiting)


def _encode_member(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packing.compress(data) + packing.flush()
    packed_bytes = _HEADER_BYTES + len(packed) + _TRAILER.size
    header = _HEADER.pack(*_HEADER_START, record_format.seq_of(data), len(data), packed_bytes)
    return header + _header_crc(header) + packed + _TRAILER.pack(zlib.crc32(data), len(data))


def _header_crc(header: bytes) -> bytes:
    return _HEADER_CRC.pack(zlib.crc32(header) & 0xFFFF)


@lru_cache(_CACHED_FILES_MAX)
def _read_members(path: Path, identity: tuple[int, ...]) -> tuple[GzipMember, ...]:
    """Read the members' headers. They are cached by the file's identity, which changes when the file is replaced."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return tuple(_walk_members(path, fd, identity[2]))
    finally:
        os.close(fd)


def _walk_members(path: Path, fd: int, end: int) -> Iterator[GzipMember]:
    begin = offset = last_seq = 0
    while begin < end:
        header = os.pread(fd, _HEADER_BYTES, begin)
        if len(header) < _HEADER_BYTES or header[_HEADER.size :] != _header_crc(header[: _HEADER.size]):
            raise _damage_error(path, begin)
        *beginning, first_seq, size_bytes, packed_bytes = _HEADER.unpack(header[: _HEADER.size])
        is_intact = (
            tuple(beginning) == _HEADER_START
            and first_seq > last_seq
            and 0 < size_bytes <= record_format.LINE_BYTES_MAX
        )
        if not is_intact or not _HEADER_BYTES + _TRAILER.size < packed_bytes <= end - begin:
            raise _damage_error(path, begin)
        yield GzipMember(first_seq, offset, size_bytes, begin, packed_bytes)
        begin, offset, last_seq = begin + packed_bytes, offset + size_bytes, first_seq


def _damage_error(path: Path, begin: int) -> JournalDamagedError:
    return JournalDamagedError(
        f"The compressed data at byte {begin} of {path} is damaged; restore the file from a backup."
    )
