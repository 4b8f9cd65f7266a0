"""The plain journal goes only after the packed one was flushed, read again and put in its place; damage is told."""

import errno
import gzip
import os
import struct
import zlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError
from sandbox.journal import compressed as packed_module
from sandbox.journal import record_format
from sandbox.journal.compressed import CompressedJournal
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

AT = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
PIECE_BYTES = 1000
HEADER = "<2sBBIBBH2sHQII"
"""RFC 1952: magic, method, flags, time, extra flags, system, length of the extra field; its id, length and content."""

HEADER_BYTES, CRC_BYTES, TRAILER_BYTES = 32, 2, 8


@pytest.fixture
def journals(tmp_path, monkeypatch):
    """Of a finished task, in several pieces."""
    monkeypatch.setattr(packed_module, "MEMBER_BYTES", PIECE_BYTES)
    journals = FileJournals(tmp_path)
    writer = journals.create("t")
    for number in range(20):
        writer.append(e.Output.from_bytes("stdout", b"%03d" % number * (number + 1) + b"\n"), at=AT)
    writer.append(e.TaskFinished(), at=AT)
    writer.close()
    return journals


@pytest.fixture
def directory(journals, tmp_path):
    return tmp_path / "tasks" / "t" / "journal"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# The order of steps


class Steps:
    """What is done to files, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.done: list[tuple[str, str]] = []
        self.flushed: dict[str, bytes] = {}
        self.after_flush = lambda path: None
        fsync, rename, unlink, unpacked = os.fsync, Path.rename, Path.unlink, CompressedJournal.iter_content

        def watched_fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.done.append(("flush", "directory" if path == directory else path.name))
            if path.is_file():
                self.flushed[path.name] = path.read_bytes()
            fsync(descriptor)
            self.after_flush(path)

        def watched_rename(path: Path, target: Path) -> Path:
            self.done.append(("rename", f"{path.name} to {target.name}"))
            return rename(path, target)

        def watched_unlink(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.done.append(("remove", path.name))
            unlink(path, missing_ok=missing_ok)

        def watched_unpacked(packed: CompressedJournal):
            self.done.append(("read again", packed._path.name))
            return unpacked(packed)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(Path, "rename", watched_rename)
        monkeypatch.setattr(Path, "unlink", watched_unlink)
        monkeypatch.setattr(CompressedJournal, "iter_content", watched_unpacked)


def test_the_plain_journal_goes_after_the_packed_one_is_on_disk_proved_and_in_its_place(
    journals, directory, monkeypatch
):
    plain, steps = (directory / "records").read_bytes(), Steps(monkeypatch, directory)
    journals.compress("t")
    assert steps.done == [
        ("flush", "records.gz.new"),
        ("read again", "records.gz.new"),
        ("rename", "records.gz.new to records.gz"),
        ("flush", "directory"),
        ("remove", "records"),
        ("flush", "directory"),
    ]
    assert gzip.decompress(steps.flushed["records.gz.new"]) == plain, "all of it had been written when it was flushed"


def test_a_packed_journal_that_the_disk_did_not_keep_replaces_nothing(journals, directory, monkeypatch):
    plain, steps = (directory / "records").read_bytes(), Steps(monkeypatch, directory)

    def flip_a_bit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES + CRC_BYTES + 5] ^= 1
        path.write_bytes(data)

    steps.after_flush = flip_a_bit
    with pytest.raises(JournalDamagedError, match="not as it was written"):
        journals.compress("t")
    assert steps.done == [("flush", "records.gz.new"), ("read again", "records.gz.new"), ("remove", "records.gz.new")]
    assert names(directory) == ["lock", "records"]
    assert (directory / "records").read_bytes() == plain


def test_a_packed_journal_with_other_records_replaces_nothing_although_it_is_whole(journals, directory, monkeypatch):
    plain, member = (directory / "records").read_bytes(), packed_module._encode_member
    monkeypatch.setattr(packed_module, "_encode_member", lambda data: member(data.replace(b"003003", b"004004")))
    with pytest.raises(JournalDamagedError, match="look at the disk"):
        journals.compress("t")
    assert names(directory) == ["lock", "records"]
    assert (directory / "records").read_bytes() == plain


@pytest.mark.parametrize("step", [(packed_module, "_write_members"), (packed_module, "_encode_member"), (os, "fsync")])
def test_what_a_full_disk_refuses_takes_no_room(journals, directory, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(*step, full)
        with pytest.raises(OSError, match="No space"):
            journals.compress("t")
    assert names(directory) == ["lock", "records"]
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_what_a_try_that_broke_off_left_is_no_hindrance(journals, directory):
    (directory / "records.gz.new").write_bytes(b"x" * 100_000)
    journals.compress("t")
    assert names(directory) == ["lock", "records.gz"]


def test_no_file_that_is_there_is_written_over(tmp_path):
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("kept", "link"):
        with pytest.raises(FileExistsError):
            packed_module._write_members([b"x\n"], tmp_path / name)
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_where_there_is_no_journal_none_is_packed(journals, directory):
    (directory / "records").unlink()
    with pytest.raises(FileNotFoundError):
        journals.compress("t")
    assert names(directory) == ["lock"]


def test_packing_leaves_no_descriptor_open(journals):
    before = sorted(Path("/proc/self/fd").iterdir())
    journals.compress("t")
    journals.compress("t")
    for _ in range(3):
        assert journals.read("t").records
        assert journals.find_offset("t", 5) > 0
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# What is in the file


def members(data: bytes) -> list[tuple[tuple, bytes]]:
    """Header and content of each, read as the format says and not by the code that writes it."""
    found = []
    while data:
        *header, seq, size, packed = struct.unpack_from(HEADER, data)
        assert data[HEADER_BYTES : HEADER_BYTES + 2] == struct.pack("<H", zlib.crc32(data[:HEADER_BYTES]) & 0xFFFF)
        content = zlib.decompress(data[HEADER_BYTES + 2 : packed - TRAILER_BYTES], wbits=-15)
        assert data[packed - TRAILER_BYTES : packed] == struct.pack("<II", zlib.crc32(content), len(content))
        assert len(content) == size
        found.append(((*header, seq), content))
        data = data[packed:]
    return found


def test_each_member_says_with_which_record_it_begins_and_how_long_it_is(journals, directory):
    plain = (directory / "records").read_bytes()
    journals.compress("t")
    found = members((directory / "records.gz").read_bytes())
    assert len(found) > 3
    assert {header[:-1] for header, _ in found} == {(b"\x1f\x8b", 8, 6, 0, 0, 255, 20, b"SB", 16)}
    assert [header[-1] for header, _ in found] == [record_format.seq_of(content) for _, content in found]
    assert b"".join(content for _, content in found) == plain


def in_pieces(*sizes: int) -> list[list[int]]:
    """How many bytes each line of each piece has."""
    lines = [b"%d" % (number % 10) * size for number, size in enumerate(sizes)]
    pieces = list(packed_module._in_chunks(lines))
    assert b"".join(pieces) == b"".join(lines)
    counts, rest = [], list(sizes)
    for piece in pieces:
        counts.append([])
        while sum(counts[-1]) < len(piece):
            counts[-1].append(rest.pop(0))
    return counts


def test_a_piece_has_256_kibibytes():
    assert in_pieces(256 * 1024 - 1, 1, 1) == [[256 * 1024 - 1, 1], [1]]


def test_a_piece_has_as_many_whole_lines_as_fit(monkeypatch):
    monkeypatch.setattr(packed_module, "MEMBER_BYTES", 10)
    assert in_pieces() == []
    assert in_pieces(10, 10) == [[10], [10]]
    assert in_pieces(4, 6, 4, 6) == [[4, 6], [4, 6]]
    assert in_pieces(4, 7, 3, 1) == [[4], [7, 3], [1]]
    assert in_pieces(11, 25, 1) == [[11], [25], [1]]
    assert in_pieces(1, 25, 1, 9, 1) == [[1], [25], [1, 9], [1]]


# What is not right is told


def member(
    content: bytes,
    *,
    seq: int = 1,
    size: int | None = None,
    packed: int = 0,
    trailer: bytes = b"",
    body: bytes | None = None,
) -> bytes:
    """One as the format has it, but for what is given."""
    packing = zlib.compressobj(wbits=-15)
    body = packing.compress(content) + packing.flush() if body is None else body
    told = packed or HEADER_BYTES + CRC_BYTES + len(body) + TRAILER_BYTES
    size = len(content) if size is None else size
    header = struct.pack(HEADER, b"\x1f\x8b", 8, 6, 0, 0, 255, 20, b"SB", 16, seq, size, told)
    trailer = trailer or struct.pack("<II", zlib.crc32(content), len(content))
    return header + struct.pack("<H", zlib.crc32(header) & 0xFFFF) + body + trailer


def text(seq: int, more: str = "") -> bytes:
    payload = b'{"seq":%d,"more":"%s"}' % (seq, more.encode())
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def opened(tmp_path: Path, *parts: bytes) -> CompressedJournal:
    path = tmp_path / "records.gz"
    path.write_bytes(b"".join(parts))
    packed_module._read_members.cache_clear()
    return CompressedJournal(path)


FIRST, SECOND = member(text(1) + text(2)), member(text(3), seq=3)
PLAIN = text(1) + text(2) + text(3)


def test_a_file_that_another_program_wrote_by_the_format_is_read(tmp_path):
    with opened(tmp_path, FIRST, SECOND) as packed:
        assert packed.size_bytes == len(PLAIN)
        assert list(packed.iter_content()) == [text(1) + text(2), text(3)]
        assert [packed.find_offset(seq) for seq in (0, 1, 2, 3, 4)] == [
            *(0, 0, len(text(1)), len(text(1) + text(2)), len(PLAIN)),
        ]


@pytest.mark.parametrize(
    "parts",
    [
        (FIRST, member(text(2), seq=1)),
        (FIRST, member(text(1), seq=0)),
        (member(text(1), seq=0),),
        (member(text(1), size=0),),
        (member(text(1), size=1001),),
        (member(b"", size=1, body=b"\3\0", packed=HEADER_BYTES + CRC_BYTES + TRAILER_BYTES),),
        (member(b"", size=1, body=b""),),
        (member(text(1), packed=1),),
        (FIRST, SECOND[:-1]),
        (FIRST, SECOND, b"\0"),
        (FIRST, SECOND[: HEADER_BYTES + CRC_BYTES - 1]),
        (FIRST, b"\x1f\x8b\x08\x08" + SECOND[4:]),
        (gzip.compress(text(1), mtime=0),),
    ],
)
def test_headers_that_no_writer_makes_are_damage(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", 1000)
    with pytest.raises(JournalDamagedError, match="restore it"):
        opened(tmp_path, *parts)


def test_a_header_is_damage_whichever_field_is_another_one(tmp_path):
    fields = list(struct.unpack_from(HEADER, FIRST))
    for number in range(9):
        other = list(fields)
        other[number] = b"XX" if isinstance(fields[number], bytes) else fields[number] ^ 1
        header = struct.pack(HEADER, *other)
        crc = struct.pack("<H", zlib.crc32(header) & 0xFFFF)
        with pytest.raises(JournalDamagedError):
            opened(tmp_path, header + crc + FIRST[HEADER_BYTES + 2 :])


@pytest.mark.parametrize("at", range(HEADER_BYTES + CRC_BYTES))
def test_a_header_does_not_match_its_checksum_when_a_bit_is_another_one(tmp_path, at):
    for bit in range(8):
        flipped = FIRST[:at] + bytes([FIRST[at] ^ 1 << bit]) + FIRST[at + 1 :]
        with pytest.raises(JournalDamagedError):
            opened(tmp_path, flipped, SECOND)


def test_a_piece_is_no_longer_than_a_line_may_be(tmp_path, monkeypatch):
    longest = text(1, "x" * 500)
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", len(longest))
    with opened(tmp_path, member(longest)) as packed:
        assert list(packed.iter_content()) == [longest]
    with pytest.raises(JournalDamagedError):
        opened(tmp_path, member(text(1, "x" * 501)))


@pytest.mark.parametrize(
    "wrong",
    [
        member(text(1)[:-1]),
        member(text(1), size=len(text(1)) + 1),
        member(text(1), trailer=struct.pack("<II", 0, len(text(1)))),
        member(text(1), trailer=struct.pack("<II", zlib.crc32(text(1)), 0)),
        # More than is told, and a trailer that fits what is told.
        member(text(1) + b"x", size=len(text(1)), trailer=struct.pack("<II", zlib.crc32(text(1)), len(text(1)))),
        member(text(1), body=b"\xff" * 20),
    ],
)
def test_content_that_is_not_what_its_member_says_is_damage(tmp_path, wrong):
    with opened(tmp_path, wrong) as packed:
        for read in (lambda: list(packed.iter_content()), lambda: packed.lines(0, 100), lambda: packed.find_offset(1)):
            with pytest.raises(JournalDamagedError, match="restore it"):
                read()


def test_a_member_that_unpacks_to_far_more_than_it_says_is_not_unpacked_in_full(tmp_path, monkeypatch):
    unpacked, decompressobj = [], zlib.decompressobj

    class Unpacking:
        def __init__(self, wbits: int) -> None:
            self._real = decompressobj(wbits)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            unpacked.append(self._real.decompress(data, max_length))
            return unpacked[-1]

    monkeypatch.setattr(zlib, "decompressobj", Unpacking)
    with opened(tmp_path, member(b"x" * 10**6, size=10)) as packed, pytest.raises(JournalDamagedError):
        list(packed.iter_content())
    assert [len(data) for data in unpacked] == [11]


def test_a_file_that_is_cut_while_it_is_open_is_damage(tmp_path):
    with opened(tmp_path, FIRST, SECOND) as packed:
        os.truncate(tmp_path / "records.gz", len(FIRST) + len(SECOND) - 1)
        assert packed.lines(0, 10_000) == [text(1), text(2)]
        with pytest.raises(JournalDamagedError, match=f"at byte {len(FIRST)} "):
            packed.lines(len(text(1) + text(2)), 10_000)


def test_a_file_that_is_changed_in_its_place_is_looked_at_again(tmp_path):
    path = tmp_path / "records.gz"
    opened(tmp_path, FIRST, SECOND).__exit__()
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


# Reading in part


def test_lines_end_within_what_is_asked_for_but_for_a_longer_first_one(tmp_path):
    one, two, three = text(1), text(2), text(3)
    with opened(tmp_path, FIRST, SECOND) as packed:
        assert packed.lines(0, len(one)) == [one]
        assert packed.lines(0, len(one) + len(two) - 1) == [one]
        assert packed.lines(0, len(one) + len(two)) == [one, two]
        assert packed.lines(0, 10_000) == [one, two], "never more than one piece has"
        assert packed.lines(0, 1) == packed.lines(0, len(one) - 1) == [one]
        assert packed.lines(len(one), 1) == [two]
        assert packed.lines(len(one + two), 10_000) == [three]
        assert packed.lines(len(PLAIN), 10_000) == []


def test_a_place_where_no_record_ends_is_lost(tmp_path):
    with opened(tmp_path, FIRST, SECOND) as packed:
        ends = (0, len(text(1)), len(text(1) + text(2)), len(PLAIN))
        for offset in set(range(-3, len(PLAIN) + 3)) - {*ends}:
            with pytest.raises(JournalOffsetError, match=f"ends at byte {offset} of .*; read it from the beginning"):
                packed.lines(offset, 10_000)


def test_an_empty_file_has_no_records_and_no_places(tmp_path):
    with opened(tmp_path) as packed:
        assert (packed.size_bytes, packed.lines(0, 10), packed.find_offset(1), list(packed.iter_content())) == (
            0,
            [],
            0,
            [],
        )
        with pytest.raises(JournalOffsetError):
            packed.lines(1, 10)
