"""What a writer promised is on the disk, also after a flush failed; what could not be promised leaves nothing."""

import errno
import os
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.journal import record_format
from sandbox.journal import writer as writer_module
from sandbox.journal.extent import Extent
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import FileJournalWriter
from sandbox.model import events as e

AT = datetime(2026, 1, 29, tzinfo=UTC)
AGAIN_BYTES = 1000


def trouble(byte_count: int = 10) -> e.ErrorReported:
    return e.ErrorReported("x", "y" * byte_count)


class Kernel:
    """Notes what is written, written again, cut off and flushed. fail: makes the next call of this name fail.

    takes: so many bytes are taken of each piece that is written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, records: Path) -> None:
        self.calls: list[tuple] = []
        self.failing: list[str] = []
        self.takes = 10**9
        self._records = records
        self._real = {name: getattr(os, name) for name in ("write", "pwrite", "fdatasync", "ftruncate")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def fail(self, *names: str) -> None:
        self.failing += names

    def write(self, descriptor: int, data: bytes) -> int:
        self._note("write", len(data))
        return self._real["write"](descriptor, data[: self.takes])

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self._note("pwrite", offset, len(data))
        assert bytes(data) == self._records.read_bytes()[offset : offset + len(data)], "the same bytes again"
        return self._real["pwrite"](descriptor, data[: self.takes], offset)

    def fdatasync(self, descriptor: int) -> None:
        self._note("flush")
        self._real["fdatasync"](descriptor)

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._note("cut", size)
        self._real["ftruncate"](descriptor, size)

    def _note(self, name: str, *arguments: int) -> None:
        self.calls.append((name, *arguments))
        if name in self.failing:
            self.failing.remove(name)
            raise OSError(errno.EIO, "Input/output error")

    def seen(self) -> list[tuple]:
        """Since the last time."""
        seen, self.calls = self.calls, []
        return seen


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "tasks" / "t" / "journal" / "records"


@pytest.fixture
def journals(tmp_path: Path) -> FileJournals:
    return FileJournals(tmp_path)


@pytest.fixture
def writer(journals: FileJournals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_module, "_REWRITE_CHUNK_BYTES", AGAIN_BYTES)
    with closing(journals.create("t")) as writer:
        yield writer


@pytest.fixture
def kernel(writer, records, monkeypatch) -> Kernel:
    return Kernel(monkeypatch, records)


# A flush that succeeds


def test_a_promise_is_written_and_then_flushed_and_nothing_is_written_again(writer, kernel, records):
    writer.append(trouble(), at=AT, durable=True)
    size = records.stat().st_size
    assert kernel.seen() == [("write", size), ("flush",)]
    writer.sync()
    assert kernel.seen() == []


def test_what_was_not_promised_is_flushed_later_once(writer, kernel):
    writer.append(trouble(), at=AT)
    writer.append(trouble(), at=AT)
    assert [call[0] for call in kernel.seen()] == ["write", "write"]
    writer.sync()
    writer.sync()
    assert kernel.seen() == [("flush",)]
    writer.append(trouble(), at=AT)
    kernel.seen()
    writer.close()
    assert kernel.seen() == [("flush",)]
    writer.close()
    assert kernel.seen() == []


def test_a_new_journal_has_nothing_to_flush_and_one_that_goes_on_has(writer, kernel, journals):
    writer.sync()
    assert kernel.seen() == []
    writer.append(trouble(), at=AT, durable=True)
    writer.close()
    kernel.seen()
    with closing(journals.open("t")) as again:
        again.sync()
        assert kernel.seen() == [("flush",)]


# A flush that failed


def test_after_a_flush_that_failed_all_since_the_last_good_one_is_written_again(writer, kernel, records):
    """The kernel takes what it could not write for written, so that a second flush alone would say yes."""
    writer.append(trouble(), at=AT, durable=True)
    good = records.stat().st_size
    for _ in range(3):
        writer.append(trouble(500), at=AT)
    end = records.stat().st_size
    kernel.seen()
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    assert kernel.seen() == [("flush",)]
    writer.sync()
    pieces = [(begin, min(AGAIN_BYTES, end - begin)) for begin in range(good, end, AGAIN_BYTES)]
    assert len(pieces) > 1
    assert kernel.seen() == [step for piece in pieces for step in (("pwrite", *piece), ("flush",))] + [("flush",)]
    writer.sync()
    assert kernel.seen() == []
    writer.append(trouble(), at=AT, durable=True)
    assert [call[0] for call in kernel.seen()] == ["write", "flush"], "what was written again is not doubtful any more"


def test_of_a_first_flush_that_failed_all_is_written_again_from_the_first_byte(writer, kernel, records):
    writer.append(trouble(300), at=AT)
    kernel.seen()
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    writer.sync()
    assert kernel.seen() == [("flush",), ("pwrite", 0, records.stat().st_size), ("flush",), ("flush",)]


def test_a_large_journal_is_written_again_in_pieces_of_eight_mebibytes(journals, records, monkeypatch):
    with closing(journals.create("t")) as writer:
        kernel = Kernel(monkeypatch, records)
        for _ in range(9):
            writer.append(e.Output.from_bytes("stdout", b"x" * 1024 * 1024), at=AT)
        kernel.fail("flush")
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
        kernel.seen()
        writer.sync()
        eight = 8 * 1024 * 1024
        pieces = [("pwrite", 0, eight), ("pwrite", eight, records.stat().st_size - eight)]
        assert [call for call in kernel.seen() if call[0] == "pwrite"] == pieces


def test_what_was_written_again_and_flushed_is_not_written_a_third_time(writer, kernel, records):
    writer.append(trouble(1700), at=AT)
    end = records.stat().st_size
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    kernel.seen()
    kernel.fail("pwrite")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    assert kernel.seen() == [("pwrite", 0, AGAIN_BYTES)]
    fail_second = iter([False, True])
    flush = kernel.fdatasync

    def fdatasync(descriptor: int) -> None:
        if next(fail_second, False):
            kernel.fail("flush")
        flush(descriptor)

    os.fdatasync = fdatasync
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    os.fdatasync = kernel.fdatasync
    assert kernel.seen() == [
        ("pwrite", 0, AGAIN_BYTES),
        ("flush",),
        ("pwrite", AGAIN_BYTES, end - AGAIN_BYTES),
        ("flush",),
    ]
    writer.sync()
    assert kernel.seen() == [("pwrite", AGAIN_BYTES, end - AGAIN_BYTES), ("flush",), ("flush",)]


def test_a_piece_of_which_the_kernel_takes_less_is_written_to_its_end(writer, kernel, records):
    writer.append(trouble(), at=AT, durable=True)
    good = records.stat().st_size
    writer.append(trouble(200), at=AT)
    end = records.stat().st_size
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    kernel.seen()
    kernel.takes = 150
    writer.sync()
    pieces = [("pwrite", begin, end - begin) for begin in range(good, end, 150)]
    assert len(pieces) > 1
    assert kernel.seen() == [*pieces, ("flush",), ("flush",)]


def test_a_promise_that_could_not_be_flushed_is_cut_off_and_no_longer_doubtful(writer, kernel, records, journals):
    writer.append(trouble(), at=AT, durable=True)
    good = records.stat().st_size
    kernel.seen()
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.append(trouble(300), at=AT, durable=True)
    assert [call[0] for call in kernel.seen()] == ["write", "flush", "cut"]
    assert (records.stat().st_size, writer.last_seq) == (good, 1)
    record = writer.append(trouble(), at=AT, durable=True)
    end = records.stat().st_size
    assert kernel.seen() == [("write", end - good), ("pwrite", good, end - good), ("flush",), ("flush",)]
    assert record.seq == 2
    assert [one.seq for one in journals.read("t").records] == [1, 2]


def test_a_flush_on_closing_that_fails_is_told_and_lets_go_all_the_same(writer, kernel, journals):
    writer.append(trouble(), at=AT)
    kernel.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    assert not journals.is_locked("t")


# What could not be written


def test_a_line_of_which_the_disk_takes_less_is_written_to_its_end(writer, kernel, records, journals):
    kernel.takes = 50
    writer.append(trouble(), at=AT, durable=True)
    size = records.stat().st_size
    assert kernel.seen() == [*[("write", rest) for rest in range(size, 0, -50)], ("flush",)]
    assert [one.seq for one in journals.read("t").records] == [1]


def test_a_line_that_broke_off_is_cut_off_before_the_next_one(writer, kernel, records, journals):
    writer.append(trouble(), at=AT, durable=True)
    good = records.stat().st_size
    kernel.takes = 50
    kernel.seen()
    write = kernel.write

    def broken(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        kernel.fail("write")
        return written

    os.write = broken
    kernel.fail("cut")
    with pytest.raises(OSError, match="Input/output"):
        writer.append(trouble(), at=AT)
    os.write, kernel.takes = kernel.write, 10**9
    assert [call[0] for call in kernel.seen()] == ["write", "write", "cut"], "which failed too"
    assert records.stat().st_size == good + 50
    writer.append(trouble(), at=AT)
    assert [call[0] for call in kernel.seen()] == ["cut", "write"]
    assert [one.seq for one in journals.read("t").records] == [1, 2]
    writer.append(trouble(), at=AT)
    assert [call[0] for call in kernel.seen()] == ["write"], "it is cut once"


def test_a_record_is_as_long_as_a_line_may_be_and_not_longer(writer, kernel, records, monkeypatch):
    writer.append(trouble(1), at=AT)
    size = records.stat().st_size
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", size)
    kernel.seen()
    with pytest.raises(OSError, match=f"has {size + 1} bytes, more than {size}") as refused:
        writer.append(trouble(2), at=AT, durable=True)
    assert refused.value.errno == errno.EMSGSIZE
    assert (kernel.seen(), writer.last_seq, records.stat().st_size) == ([], 1, size)
    assert writer.append(trouble(1), at=AT).seq == 2


# Going on after a crash


def descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def test_a_torn_tail_is_cut_off_and_that_is_flushed(writer, kernel, records, journals):
    writer.append(trouble(), at=AT, durable=True)
    writer.close()
    good = records.stat().st_size
    with records.open("ab") as file:
        file.write(b"torn")
    kernel.seen()
    with closing(journals.open("t")) as again:
        assert kernel.seen() == [("cut", good)]
        assert records.stat().st_size == good
        again.sync()
        assert kernel.seen() == [("flush",)]
        assert (again.append(trouble(), at=AT).epoch, again.last_seq) == (2, 2)


def test_a_whole_journal_is_not_cut(writer, kernel, journals):
    writer.append(trouble(), at=AT, durable=True)
    writer.close()
    kernel.seen()
    with closing(journals.open("t")) as again:
        again.append(trouble(), at=AT)
        assert [call[0] for call in kernel.seen()] == ["write"]


def test_a_journal_with_nothing_but_a_torn_tail_begins_anew_and_is_flushed(writer, kernel, records, journals):
    writer.close()
    records.write_bytes(b"torn")
    kernel.seen()
    with closing(journals.open("t")) as again:
        assert kernel.seen() == [("cut", 0)]
        again.sync()
        assert kernel.seen() == [("flush",)]
        assert (again.append(trouble(), at=AT).seq, again.append(trouble(), at=AT).epoch) == (1, 1)


def test_a_torn_tail_that_cannot_be_cut_off_is_told_and_nothing_stays_open(writer, kernel, records, journals):
    writer.append(trouble(), at=AT, durable=True)
    writer.close()
    with records.open("ab") as file:
        file.write(b"torn")
    before = descriptors()
    kernel.fail("cut")
    with pytest.raises(OSError, match="Input/output"):
        journals.open("t")
    assert descriptors() == before
    assert not journals.is_locked("t")


def test_a_lock_that_has_descriptor_0_is_let_go_too(journals, records):
    """Where a program was started without standard input."""
    journals.create("t").close()
    lock = os.open(records.with_name("lock"), os.O_RDWR)
    standard_input = os.dup(0)
    try:
        os.dup2(lock, 0)
        writer = FileJournalWriter(records, 0, Extent(None, 0))
        writer.append(trouble(), at=AT)
        writer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
        assert writer.lock_fd < 0
    finally:
        os.dup2(standard_input, 0)
        os.close(standard_input)
        os.close(lock)


def test_a_writer_that_is_closed_has_closed_its_files(journals):
    before = descriptors()
    writer = journals.create("t")
    assert len(descriptors()) == len(before) + 2
    assert not os.get_inheritable(writer.lock_fd)
    writer.append(trouble(), at=AT)
    writer.close()
    assert descriptors() == before
    assert writer.lock_fd < 0
