"""Durable records are on disk even after a failed flush. Records that could not be made durable are removed."""

import errno
import fcntl
import os
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from doubles.manifests import manifest
from sandbox.interfaces.journal import LockState
from sandbox.journal import record_format
from sandbox.journal import writer as writer_module
from sandbox.journal.journals import FileJournals
from sandbox.journal.reader import JournalEnd
from sandbox.journal.writer import FileJournalWriter
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.failure import Failure, FailureCode

TIMESTAMP = datetime(2026, 1, 29, tzinfo=UTC)
REWRITE_CHUNK_BYTES = 1000


def error_event(byte_count: int = 10) -> e.ErrorReported:
    return e.ErrorReported("x", "y" * byte_count)


class RecordedSyscalls:
    """Records writes, rewrites, truncations and flushes. `fail` makes the next call with that name fail.

    `write_bytes_max` limits the bytes accepted per write.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, records: Path) -> None:
        self.calls: list[tuple] = []
        self.failing: list[str] = []
        self.write_bytes_max = 10**9
        self._records = records
        self._original = {name: getattr(os, name) for name in ("write", "pwrite", "fdatasync", "ftruncate")}
        for name in self._original:
            monkeypatch.setattr(os, name, getattr(self, name))

    def fail(self, *names: str) -> None:
        self.failing += names

    def write(self, descriptor: int, data: bytes) -> int:
        self._record("write", len(data))
        return self._original["write"](descriptor, data[: self.write_bytes_max])

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self._record("pwrite", offset, len(data))
        assert bytes(data) == self._records.read_bytes()[offset : offset + len(data)], (
            "the rewritten bytes must be identical"
        )
        return self._original["pwrite"](descriptor, data[: self.write_bytes_max], offset)

    def fdatasync(self, descriptor: int) -> None:
        self._record("flush")
        self._original["fdatasync"](descriptor)

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._record("truncate", size)
        self._original["ftruncate"](descriptor, size)

    def _record(self, name: str, *arguments: int) -> None:
        self.calls.append((name, *arguments))
        if name in self.failing:
            self.failing.remove(name)
            raise OSError(errno.EIO, "Input/output error")

    def pop_calls(self) -> list[tuple]:
        """Return the calls since the previous `pop_calls`."""
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "tasks" / "t" / "journal" / "records"


@pytest.fixture
def journals(tmp_path: Path) -> FileJournals:
    return FileJournals(tmp_path)


@pytest.fixture
def writer(journals: FileJournals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_module, "_REWRITE_CHUNK_BYTES", REWRITE_CHUNK_BYTES)
    with closing(journals.create("t")) as writer:
        yield writer


@pytest.fixture
def syscalls(writer, records, monkeypatch) -> RecordedSyscalls:
    return RecordedSyscalls(monkeypatch, records)


# Successful flushes


def test_durable_append_is_written_and_flushed_once(writer, syscalls, records):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    size = records.stat().st_size
    assert syscalls.pop_calls() == [("write", size), ("flush",)]
    writer.sync()
    assert syscalls.pop_calls() == []


def test_non_durable_appends_are_flushed_once_by_sync(writer, syscalls):
    writer.append(error_event(), at=TIMESTAMP)
    writer.append(error_event(), at=TIMESTAMP)
    assert [call[0] for call in syscalls.pop_calls()] == ["write", "write"]
    writer.sync()
    writer.sync()
    assert syscalls.pop_calls() == [("flush",)]
    writer.append(error_event(), at=TIMESTAMP)
    syscalls.pop_calls()
    writer.close()
    assert syscalls.pop_calls() == [("flush",)]
    writer.close()
    assert syscalls.pop_calls() == []


def test_first_sync_flushes_a_reopened_journal_but_not_a_new_one(writer, syscalls, journals):
    writer.sync()
    assert syscalls.pop_calls() == []
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    writer.close()
    syscalls.pop_calls()
    with closing(journals.open("t")) as reopened:
        reopened.sync()
        assert syscalls.pop_calls() == [("flush",)]


@pytest.mark.parametrize(
    ("event", "is_flushed"),
    [
        (e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, "it failed")), True),
        (e.AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")), True),
        (e.CancelRequested("no longer needed"), True),
        (e.ArtifactCollected(Artifact("a", "a", 1, "text/plain", "sha256:0")), True),
        (e.Usage("model", 1, 2), True),
        (e.Output.from_bytes("stdout", b"x"), False),
        (e.AgentMessage("Hello."), False),
        (e.Progress(turns=1), False),
    ],
)
def test_recorder_flushes_events_that_must_survive_a_crash(writer, syscalls, journals, event, is_flushed):
    """The task's state does not change, because another attempt follows a failure."""
    recorder = journals.recorder(writer, None, lambda: TIMESTAMP)
    for earlier in (
        e.TaskSubmitted("t", manifest("t", lifecycle={"retries": 1})),
        e.AttemptStarted("abcdefgh2341", "bubblewrap", "host", "boot"),
        e.WorkspacePrepared("0123456789abcdef"),
        e.SandboxCreated("sandbox-abcdefgh2341", "namespaces", "host"),
        e.AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab", 50.0, "Claude Code"),
    ):
        recorder.record(earlier)
    syscalls.pop_calls()
    recorder.record(event)
    assert (("flush",) in syscalls.pop_calls()) == is_flushed


# Failed flushes


def test_data_since_the_last_successful_flush_is_rewritten_after_a_failed_flush(writer, syscalls, records):
    """The kernel marks failed pages as clean, so a second flush alone would succeed without writing them."""
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    durable_size = records.stat().st_size
    for _ in range(3):
        writer.append(error_event(500), at=TIMESTAMP)
    end = records.stat().st_size
    syscalls.pop_calls()
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    assert syscalls.pop_calls() == [("flush",)]
    writer.sync()
    pieces = [(begin, min(REWRITE_CHUNK_BYTES, end - begin)) for begin in range(durable_size, end, REWRITE_CHUNK_BYTES)]
    assert len(pieces) > 1
    assert syscalls.pop_calls() == [step for piece in pieces for step in (("pwrite", *piece), ("flush",))] + [
        ("flush",)
    ]
    writer.sync()
    assert syscalls.pop_calls() == []
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    assert [call[0] for call in syscalls.pop_calls()] == ["write", "flush"], "rewritten data is clean"


def test_all_data_is_rewritten_after_the_first_flush_has_failed(writer, syscalls, records):
    writer.append(error_event(300), at=TIMESTAMP)
    syscalls.pop_calls()
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    writer.sync()
    assert syscalls.pop_calls() == [("flush",), ("pwrite", 0, records.stat().st_size), ("flush",), ("flush",)]


def test_large_journal_is_rewritten_in_chunks_of_eight_mebibytes(journals, records, monkeypatch):
    with closing(journals.create("t")) as writer:
        syscalls = RecordedSyscalls(monkeypatch, records)
        for _ in range(9):
            writer.append(e.Output.from_bytes("stdout", b"x" * 1024 * 1024), at=TIMESTAMP)
        syscalls.fail("flush")
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
        syscalls.pop_calls()
        writer.sync()
        chunk_bytes = 8 * 1024 * 1024
        pieces = [("pwrite", 0, chunk_bytes), ("pwrite", chunk_bytes, records.stat().st_size - chunk_bytes)]
        assert [call for call in syscalls.pop_calls() if call[0] == "pwrite"] == pieces


def test_rewritten_and_flushed_data_is_not_rewritten_again(writer, syscalls, records):
    writer.append(error_event(1700), at=TIMESTAMP)
    end = records.stat().st_size
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    syscalls.pop_calls()
    syscalls.fail("pwrite")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    assert syscalls.pop_calls() == [("pwrite", 0, REWRITE_CHUNK_BYTES)]
    fail_second = iter([False, True])
    original_fdatasync = syscalls.fdatasync

    def fdatasync(descriptor: int) -> None:
        if next(fail_second, False):
            syscalls.fail("flush")
        original_fdatasync(descriptor)

    os.fdatasync = fdatasync
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    os.fdatasync = syscalls.fdatasync
    assert syscalls.pop_calls() == [
        ("pwrite", 0, REWRITE_CHUNK_BYTES),
        ("flush",),
        ("pwrite", REWRITE_CHUNK_BYTES, end - REWRITE_CHUNK_BYTES),
        ("flush",),
    ]
    writer.sync()
    assert syscalls.pop_calls() == [("pwrite", REWRITE_CHUNK_BYTES, end - REWRITE_CHUNK_BYTES), ("flush",), ("flush",)]


def test_short_rewrite_is_continued(writer, syscalls, records):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    durable_size = records.stat().st_size
    writer.append(error_event(200), at=TIMESTAMP)
    end = records.stat().st_size
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.sync()
    syscalls.pop_calls()
    syscalls.write_bytes_max = 150
    writer.sync()
    pieces = [("pwrite", begin, end - begin) for begin in range(durable_size, end, 150)]
    assert len(pieces) > 1
    assert syscalls.pop_calls() == [*pieces, ("flush",), ("flush",)]


def test_durable_append_with_a_failed_flush_is_truncated(writer, syscalls, records, journals):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    durable_size = records.stat().st_size
    syscalls.pop_calls()
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.append(error_event(300), at=TIMESTAMP, durable=True)
    assert [call[0] for call in syscalls.pop_calls()] == ["write", "flush", "truncate"]
    assert (records.stat().st_size, writer.last_seq) == (durable_size, 1)
    record = writer.append(error_event(), at=TIMESTAMP, durable=True)
    end = records.stat().st_size
    assert syscalls.pop_calls() == [
        ("write", end - durable_size),
        ("pwrite", durable_size, end - durable_size),
        ("flush",),
        ("flush",),
    ]
    assert record.seq == 2
    assert [record.seq for record in journals.read("t").records] == [1, 2]


def test_failed_flush_on_close_raises_and_releases_the_lock(writer, syscalls, journals):
    writer.append(error_event(), at=TIMESTAMP)
    syscalls.fail("flush")
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    assert journals.lock_state("t") is LockState.FREE


# Failed writes


def test_short_write_is_continued(writer, syscalls, records, journals):
    syscalls.write_bytes_max = 50
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    size = records.stat().st_size
    assert syscalls.pop_calls() == [*[("write", remaining) for remaining in range(size, 0, -50)], ("flush",)]
    assert [record.seq for record in journals.read("t").records] == [1]


def test_partial_line_is_truncated_before_the_next_append(writer, syscalls, records, journals):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    durable_size = records.stat().st_size
    syscalls.write_bytes_max = 50
    syscalls.pop_calls()
    write = syscalls.write

    def failing_write(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        syscalls.fail("write")
        return written

    os.write = failing_write
    syscalls.fail("truncate")
    with pytest.raises(OSError, match="Input/output"):
        writer.append(error_event(), at=TIMESTAMP)
    os.write, syscalls.write_bytes_max = syscalls.write, 10**9
    assert [call[0] for call in syscalls.pop_calls()] == ["write", "write", "truncate"], "the truncation failed too"
    assert records.stat().st_size == durable_size + 50
    writer.append(error_event(), at=TIMESTAMP)
    assert [call[0] for call in syscalls.pop_calls()] == ["truncate", "write"]
    assert [record.seq for record in journals.read("t").records] == [1, 2]
    writer.append(error_event(), at=TIMESTAMP)
    assert [call[0] for call in syscalls.pop_calls()] == ["write"], "the journal is truncated once"


def test_record_over_the_line_limit_is_rejected(writer, syscalls, records, monkeypatch):
    writer.append(error_event(1), at=TIMESTAMP)
    size = records.stat().st_size
    monkeypatch.setattr(record_format, "LINE_BYTES_MAX", size)
    syscalls.pop_calls()
    with pytest.raises(OSError, match=f"has {size + 1} bytes, more than {size}") as caught:
        writer.append(error_event(2), at=TIMESTAMP, durable=True)
    assert caught.value.errno == errno.EMSGSIZE
    assert (syscalls.pop_calls(), writer.last_seq, records.stat().st_size) == ([], 1, size)
    assert writer.append(error_event(1), at=TIMESTAMP).seq == 2


# Reopening after a crash


def descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def test_torn_tail_is_truncated_and_flushed(writer, syscalls, records, journals):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    writer.close()
    durable_size = records.stat().st_size
    with records.open("ab") as file:
        file.write(b"torn")
    syscalls.pop_calls()
    with closing(journals.open("t")) as reopened:
        assert syscalls.pop_calls() == [("truncate", durable_size)]
        assert records.stat().st_size == durable_size
        reopened.sync()
        assert syscalls.pop_calls() == [("flush",)]
        assert (reopened.append(error_event(), at=TIMESTAMP).epoch, reopened.last_seq) == (2, 2)


def test_intact_journal_is_not_truncated(writer, syscalls, journals):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    writer.close()
    syscalls.pop_calls()
    with closing(journals.open("t")) as reopened:
        reopened.append(error_event(), at=TIMESTAMP)
        assert [call[0] for call in syscalls.pop_calls()] == ["write"]


def test_journal_with_only_a_torn_tail_is_emptied_and_flushed(writer, syscalls, records, journals):
    writer.close()
    records.write_bytes(b"torn")
    syscalls.pop_calls()
    with closing(journals.create("t")) as reopened:
        assert ("truncate", 0) in syscalls.pop_calls()
        reopened.sync()
        assert syscalls.pop_calls() == [("flush",)]
        assert (
            reopened.append(error_event(), at=TIMESTAMP).seq,
            reopened.append(error_event(), at=TIMESTAMP).epoch,
        ) == (1, 1)


def test_failed_truncation_of_a_torn_tail_raises_and_closes_all_files(writer, syscalls, records, journals):
    writer.append(error_event(), at=TIMESTAMP, durable=True)
    writer.close()
    with records.open("ab") as file:
        file.write(b"torn")
    before = descriptors()
    syscalls.fail("truncate")
    with pytest.raises(OSError, match="Input/output"):
        journals.open("t")
    assert descriptors() == before
    assert journals.lock_state("t") is LockState.FREE


def test_lock_with_descriptor_0_is_released(journals, records):
    """A process started without standard input may get descriptor 0 for the lock."""
    journals.create("t").close()
    lock = os.open(records.with_name("lock"), os.O_RDWR)
    standard_input = os.dup(0)
    try:
        os.dup2(lock, 0)
        writer = FileJournalWriter(records, 0, JournalEnd(None, 0))
        writer.append(error_event(), at=TIMESTAMP)
        writer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
        assert writer.lock_fd < 0
    finally:
        os.dup2(standard_input, 0)
        os.close(standard_input)
        os.close(lock)


def test_closed_writer_has_no_open_files(journals):
    before = descriptors()
    writer = journals.create("t")
    assert len(descriptors()) == len(before) + 2
    assert not os.get_inheritable(writer.lock_fd)
    assert fcntl.fcntl(writer.lock_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    writer.append(error_event(), at=TIMESTAMP)
    writer.close()
    assert descriptors() == before
    assert writer.lock_fd < 0


def test_lock_of_a_missing_journal_is_created_only_on_request(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError):
        writer_module.acquire_lock(path)
    assert not path.exists()
    os.close(writer_module.acquire_lock(path, create=True))
    assert path.exists()
