"""The plain journal is removed only after the compressed journal is flushed, verified and renamed.

Damage is detected.
"""

import errno
import gzip
import os
import struct
import zlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError
from sandbox.journal import compressed as compressed_module
from sandbox.journal import record_format
from sandbox.journal.compressed import CompressedJournal
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
MEMBER_BYTES = 1000
HEADER = "<2sBBIBBH2sHQII"
"""RFC 1952: magic, method, flags, mtime, extra flags, OS, length of the extra field; its ID, length and content."""

HEADER_BYTES, CRC_BYTES, TRAILER_BYTES = 32, 2, 8


@pytest.fixture
def journals(tmp_path, monkeypatch):
    """The journal of a finished task, split into several members."""
    monkeypatch.setattr(compressed_module, "MEMBER_BYTES", MEMBER_BYTES)
    journals = FileJournals(tmp_path)
    writer = journals.create("t")
    for number in range(20):
        writer.append(e.Output.from_bytes("stdout", b"%03d" % number * (number + 1) + b"\n"), at=TIMESTAMP)
    writer.append(e.TaskFinished(), at=TIMESTAMP)
    writer.close()
    return journals


@pytest.fixture
def directory(journals, tmp_path):
    return tmp_path / "tasks" / "t" / "journal"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# The order of file operations


class FileOperations:
    """Records file operations in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.operations: list[tuple[str, str]] = []
        self.flushed: dict[str, bytes] = {}
        self.after_flush = lambda path: None
        fsync, rename, unlink, iter_content = os.fsync, Path.rename, Path.unlink, CompressedJournal.iter_content

        def recorded_fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.operations.append(("flush", "directory" if path == directory else path.name))
            if path.is_file():
                self.flushed[path.name] = path.read_bytes()
            fsync(descriptor)
            self.after_flush(path)

        def recorded_rename(path: Path, target: Path) -> Path:
            self.operations.append(("rename", f"{path.name} to {target.name}"))
            return rename(path, target)

        def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.operations.append(("remove", path.name))
            unlink(path, missing_ok=missing_ok)

        def recorded_iter_content(compressed: CompressedJournal):
            self.operations.append(("verify", compressed._path.name))
            return iter_content(compressed)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(Path, "rename", recorded_rename)
        monkeypatch.setattr(Path, "unlink", recorded_unlink)
        monkeypatch.setattr(CompressedJournal, "iter_content", recorded_iter_content)


def test_plain_journal_is_removed_after_the_compressed_journal_is_durable(journals, directory, monkeypatch):
    plain, operations = (directory / "records").read_bytes(), FileOperations(monkeypatch, directory)
    journals.compress("t")
    assert operations.operations == [
        ("flush", "records.gz.new"),
        ("verify", "records.gz.new"),
        ("rename", "records.gz.new to records.gz"),
        ("flush", "directory"),
        ("remove", "records"),
        ("flush", "directory"),
    ]
    assert gzip.decompress(operations.flushed["records.gz.new"]) == plain, "the file was complete when it was flushed"


def test_compressed_journal_corrupted_on_disk_is_discarded(journals, directory, monkeypatch):
    plain, operations = (directory / "records").read_bytes(), FileOperations(monkeypatch, directory)

    def flip_a_bit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES + CRC_BYTES + 5] ^= 1
        path.write_bytes(data)

    operations.after_flush = flip_a_bit
    with pytest.raises(JournalDamagedError, match="damaged"):
        journals.compress("t")
    assert operations.operations == [
        ("flush", "records.gz.new"),
        ("verify", "records.gz.new"),
        ("remove", "records.gz.new"),
    ]
    assert names(directory) == ["lock", "records"]
    assert (directory / "records").read_bytes() == plain


def test_compressed_journal_whose_records_differ_is_discarded(journals, directory, monkeypatch):
    plain, member = (directory / "records").read_bytes(), compressed_module._encode_member
    monkeypatch.setattr(compressed_module, "_encode_member", lambda data: member(data.replace(b"003003", b"004004")))
    with pytest.raises(JournalDamagedError, match="check the disk"):
        journals.compress("t")
    assert names(directory) == ["lock", "records"]
    assert (directory / "records").read_bytes() == plain


@pytest.mark.parametrize(
    "step", [(compressed_module, "_write_members"), (compressed_module, "_encode_member"), (os, "fsync")]
)
def test_full_disk_leaves_no_partial_file(journals, directory, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*step, full)
        with pytest.raises(OSError, match="No space"):
            journals.compress("t")
    assert names(directory) == ["lock", "records"]
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_leftover_of_an_interrupted_compression_is_replaced(journals, directory):
    (directory / "records.gz.new").write_bytes(b"x" * 100_000)
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("kept", "link"):
        with pytest.raises(FileExistsError):
            compressed_module._write_members([b"x\n"], tmp_path / name)
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_missing_journal_is_an_error(journals, directory):
    (directory / "records").unlink()
    with pytest.raises(FileNotFoundError):
        journals.compress("t")
    assert names(directory) == ["lock"]


def test_compression_leaves_no_descriptor_open(journals):
    before = sorted(Path("/proc/self/fd").iterdir())
    journals.compress("t")
    journals.compress("t")
    for _ in range(3):
        assert journals.read("t").records
        assert journals.find_offset("t", 5) > 0
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# File format


def members(data: bytes) -> list[tuple[tuple, bytes]]:
    """Return the header and content of each member, parsed independently of the writer."""
    result = []
    while data:
        *header, seq, size, member_size = struct.unpack_from(HEADER, data)
        assert data[HEADER_BYTES : HEADER_BYTES + 2] == struct.pack("<H", zlib.crc32(data[:HEADER_BYTES]) & 0xFFFF)
        content = zlib.decompress(data[HEADER_BYTES + 2 : member_size - TRAILER_BYTES], wbits=-15)
        assert data[member_size - TRAILER_BYTES : member_size] == struct.pack("<II", zlib.crc32(content), len(content))
        assert len(content) == size
        result.append(((*header, seq), content))
        data = data[member_size:]
    return result


def test_each_member_header_has_the_first_seq_and_the_size_of_the_member(journals, directory):
    plain = (directory / "records").read_bytes()
    journals.compress("t")
    parsed = members((directory / "records.gz").read_bytes())
    assert len(parsed) > 3
    assert {header[:-1] for header, _ in parsed} == {(b"\x1f\x8b", 8, 6, 0, 0, 255, 20, b"SB", 16)}
    assert [header[-1] for header, _ in parsed] == [record_format.seq_of(content) for _, content in parsed]
    assert b"".join(content for _, content in parsed) == plain


def chunk_line_sizes(*sizes: int) -> list[list[int]]:
    """Return the byte count of each line in each chunk."""
    lines = [b"%d" % (number % 10) * size for number, size in enumerate(sizes)]
    chunks = list(compressed_module._in_chunks(lines))
    assert b"".join(chunks) == b"".join(lines)
    counts, remaining = [], list(sizes)
    for chunk in chunks:
        counts.append([])
        while sum(counts[-1]) < len(chunk):
            counts[-1].append(remaining.pop(0))
    return counts


def test_chunk_has_at_most_256_kibibytes():
    assert chunk_line_sizes(256 * 1024 - 1, 1, 1) == [[256 * 1024 - 1, 1], [1]]


def test_chunk_contains_as_many_whole_lines_as_fit(monkeypatch):
    monkeypatch.setattr(compressed_module, "MEMBER_BYTES", 10)
    assert chunk_line_sizes() == []
    assert chunk_line_sizes(10, 10) == [[10], [10]]
    assert chunk_line_sizes(4, 6, 4, 6) == [[4, 6], [4, 6]]
    assert chunk_line_sizes(4, 7, 3, 1) == [[4], [7, 3], [1]]
    assert chunk_line_sizes(11, 25, 1) == [[11], [25], [1]]
    assert chunk_line_sizes(1, 25, 1, 9, 1) == [[1], [25], [1, 9], [1]]


# Damage


def member(
    content: bytes,
    *,
    seq: int = 1,
    size: int | None = None,
    member_size: int = 0,
    trailer: bytes = b"",
    body: bytes | None = None,
) -> bytes:
    """Build a member that is valid except for the given fields."""
    compressor = zlib.compressobj(wbits=-15)
    body = compressor.compress(content) + compressor.flush() if body is None else body
    declared_size = member_size or HEADER_BYTES + CRC_BYTES + len(body) + TRAILER_BYTES
    size = len(content) if size is None else size
    header = struct.pack(HEADER, b"\x1f\x8b", 8, 6, 0, 0, 255, 20, b"SB", 16, seq, size, declared_size)
    trailer = trailer or struct.pack("<II", zlib.crc32(content), len(content))
    return header + struct.pack("<H", zlib.crc32(header) & 0xFFFF) + body + trailer


def record_line(seq: int, more: str = "") -> bytes:
    payload = b'{"seq":%d,"more":"%s"}' % (seq, more.encode())
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def open_compressed(tmp_path: Path, *parts: bytes) -> CompressedJournal:
    path = tmp_path / "records.gz"
    path.write_bytes(b"".join(parts))
    compressed_module._read_members.cache_clear()
    return CompressedJournal(path)


FIRST, SECOND = member(record_line(1) + record_line(2)), member(record_line(3), seq=3)
PLAIN = record_line(1) + record_line(2) + record_line(3)


def test_file_with_members_of_different_sizes_is_readable(tmp_path):
    with open_compressed(tmp_path, FIRST, SECOND) as journal:
        assert journal.size_bytes == len(PLAIN)
        assert list(journal.iter_content()) == [record_line(1) + record_line(2), record_line(3)]
        assert [journal.find_offset(seq) for seq in (0, 1, 2, 3, 4)] == [
            *(0, 0, len(record_line(1)), len(record_line(1) + record_line(2)), len(PLAIN)),
        ]


@pytest.mark.parametrize(
    "parts",
    [
        (FIRST, member(record_line(2), seq=1)),
        (FIRST, member(record_line(1), seq=0)),
        (member(record_line(1), seq=0),),
        (member(record_line(1), size=0),),
        (member(record_line(1), size=1001),),
        (member(b"", size=1, body=b"\3\0", member_size=HEADER_BYTES + CRC_BYTES + TRAILER_BYTES),),
        (member(b"", size=1, body=b""),),
        (member(record_line(1), member_size=1),),
        (FIRST, SECOND[:-1]),
        (FIRST, SECOND, b"\0"),
        (FIRST, SECOND[: HEADER_BYTES + CRC_BYTES - 1]),
        (FIRST, b"\x1f\x8b\x08\x08" + SECOND[4:]),
        (gzip.compress(record_line(1), mtime=0),),
    ],
)
def test_invalid_header_is_reported_as_damage(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", 1000)
    with pytest.raises(JournalDamagedError, match="restore the file"):
        open_compressed(tmp_path, *parts)


def test_changed_header_field_is_reported_as_damage(tmp_path):
    fields = list(struct.unpack_from(HEADER, FIRST))
    for number in range(9):
        other = list(fields)
        other[number] = b"XX" if isinstance(fields[number], bytes) else fields[number] ^ 1
        header = struct.pack(HEADER, *other)
        crc = struct.pack("<H", zlib.crc32(header) & 0xFFFF)
        with pytest.raises(JournalDamagedError):
            open_compressed(tmp_path, header + crc + FIRST[HEADER_BYTES + 2 :])


@pytest.mark.parametrize("at", range(HEADER_BYTES + CRC_BYTES))
def test_header_bit_flip_is_detected_by_its_checksum(tmp_path, at):
    for bit in range(8):
        flipped = FIRST[:at] + bytes([FIRST[at] ^ 1 << bit]) + FIRST[at + 1 :]
        with pytest.raises(JournalDamagedError):
            open_compressed(tmp_path, flipped, SECOND)


def test_member_over_the_line_limit_is_reported_as_damage(tmp_path, monkeypatch):
    longest = record_line(1, "x" * 500)
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", len(longest))
    with open_compressed(tmp_path, member(longest)) as journal:
        assert list(journal.iter_content()) == [longest]
    with pytest.raises(JournalDamagedError):
        open_compressed(tmp_path, member(record_line(1, "x" * 501)))


@pytest.mark.parametrize(
    "damaged",
    [
        member(record_line(1)[:-1]),
        member(record_line(1), size=len(record_line(1)) + 1),
        member(record_line(1), trailer=struct.pack("<II", 0, len(record_line(1)))),
        member(record_line(1), trailer=struct.pack("<II", zlib.crc32(record_line(1)), 0)),
        # More content than the header declares, with a trailer that matches the header.
        member(
            record_line(1) + b"x",
            size=len(record_line(1)),
            trailer=struct.pack("<II", zlib.crc32(record_line(1)), len(record_line(1))),
        ),
        member(record_line(1), body=b"\xff" * 20),
    ],
)
def test_content_that_contradicts_its_header_is_reported_as_damage(tmp_path, damaged):
    with open_compressed(tmp_path, damaged) as journal:
        for read in (
            lambda: list(journal.iter_content()),
            lambda: journal.lines(0, 100),
            lambda: journal.find_offset(1),
        ):
            with pytest.raises(JournalDamagedError, match="restore the file"):
                read()


def test_decompression_stops_at_the_declared_size(tmp_path, monkeypatch):
    decompressed, decompressobj = [], zlib.decompressobj

    class RecordingDecompressor:
        def __init__(self, wbits: int) -> None:
            self._real = decompressobj(wbits)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            decompressed.append(self._real.decompress(data, max_length))
            return decompressed[-1]

    monkeypatch.setattr(zlib, "decompressobj", RecordingDecompressor)
    with open_compressed(tmp_path, member(b"x" * 10**6, size=10)) as journal, pytest.raises(JournalDamagedError):
        list(journal.iter_content())
    assert [len(data) for data in decompressed] == [11]


def test_truncation_of_an_open_file_is_reported_as_damage(tmp_path):
    with open_compressed(tmp_path, FIRST, SECOND) as journal:
        os.truncate(tmp_path / "records.gz", len(FIRST) + len(SECOND) - 1)
        assert journal.lines(0, 10_000) == [record_line(1), record_line(2)]
        with pytest.raises(JournalDamagedError, match=f"at byte {len(FIRST)} "):
            journal.lines(len(record_line(1) + record_line(2)), 10_000)


def test_file_modified_in_place_is_revalidated(tmp_path):
    path = tmp_path / "records.gz"
    open_compressed(tmp_path, FIRST, SECOND).__exit__()
    os.utime(path, ns=(10**18, 10**18))
    CompressedJournal(path).__exit__()
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES - 1)
        file.write(b"\xff")
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(JournalDamagedError):
        CompressedJournal(path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# Partial reads


def test_lines_fit_the_byte_limit_unless_the_first_line_is_longer(tmp_path):
    one, two, three = record_line(1), record_line(2), record_line(3)
    with open_compressed(tmp_path, FIRST, SECOND) as journal:
        assert journal.lines(0, len(one)) == [one]
        assert journal.lines(0, len(one) + len(two) - 1) == [one]
        assert journal.lines(0, len(one) + len(two)) == [one, two]
        assert journal.lines(0, 10_000) == [one, two], "never more than one member"
        assert journal.lines(0, 1) == journal.lines(0, len(one) - 1) == [one]
        assert journal.lines(len(one), 1) == [two]
        assert journal.lines(len(one + two), 10_000) == [three]
        assert journal.lines(len(PLAIN), 10_000) == []


def test_offset_inside_a_record_is_an_error(tmp_path):
    with open_compressed(tmp_path, FIRST, SECOND) as journal:
        ends = (0, len(record_line(1)), len(record_line(1) + record_line(2)), len(PLAIN))
        for offset in set(range(-3, len(PLAIN) + 3)) - {*ends}:
            with pytest.raises(JournalOffsetError, match=f"byte {offset} of .*; read the journal from its start"):
                journal.lines(offset, 10_000)


def test_empty_file_has_no_records(tmp_path):
    with open_compressed(tmp_path) as journal:
        assert (journal.size_bytes, journal.lines(0, 10), journal.find_offset(1), list(journal.iter_content())) == (
            0,
            [],
            0,
            [],
        )
        with pytest.raises(JournalOffsetError):
            journal.lines(1, 10)
