"""A journal has one writer at a time, even if writers are processes that hand it over, crash or are killed."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime

import pytest

from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, LockState
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

PRELUDE = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

journals = FileJournals(Path(sys.argv[1]))
now = lambda: datetime.now(UTC)
def report(word):
    print(word, flush=True)
"""
HOLD_PROGRAM = PRELUDE + "writer = journals.open('task-1'); report('held'); sys.stdin.read()"
ADOPT_PROGRAM = (
    PRELUDE
    + """
writer = journals.adopt('task-1', int(sys.argv[2]))
report('adopted')
sys.stdin.readline()
writer.append(e.TaskFinished(), at=now(), durable=True)
report('written')
sys.stdin.read()
"""
)
APPEND_FOREVER_PROGRAM = (
    PRELUDE
    + """
writer = journals.open('task-1')
while True:
    output = e.Output.from_bytes('stdout', b'x' * (writer.last_seq % 7 * 30_000))
    writer.append(output, at=now(), durable=writer.last_seq % 5 == 0)
    report(writer.last_seq)
"""
)
TIMEOUT_SECONDS = 20


@pytest.fixture
def journals(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    writer.append(e.ErrorReported("first", ""), at=datetime.now(UTC), durable=True)
    writer.close()
    return journals


@contextlib.contextmanager
def child_process(code, *arguments, pass_fds=()):
    """Start a child process that prints lines, and kill it at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_until_free(journals):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while journals.lock_state("task-1") is LockState.HELD:
        assert time.monotonic() < deadline, "the lock is still held"
        time.sleep(0.005)


def test_journal_is_busy_until_the_holder_is_killed(journals, tmp_path):
    with child_process(HOLD_PROGRAM, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        assert journals.lock_state("task-1") is LockState.HELD
        with pytest.raises(JournalBusyError) as caught:
            journals.open("task-1")
        assert (caught.value.code, caught.value.retryable) == ("journal_busy", True)

        os.kill(holder.pid, signal.SIGKILL)
        wait_until_free(journals)
        journals.open("task-1").close()


def test_inherited_lock_survives_close_in_the_parent(journals, tmp_path):
    writer = journals.open("task-1")
    with child_process(ADOPT_PROGRAM, tmp_path, writer.lock_fd, pass_fds=(writer.lock_fd,)) as runner:
        assert runner.stdout.readline() == "adopted\n"
        before = writer.append(e.ErrorReported("before", ""), at=datetime.now(UTC))
        writer.close()
        assert journals.lock_state("task-1") is LockState.HELD
        with pytest.raises(JournalBusyError):
            journals.open("task-1")

        os.kill(runner.pid, signal.SIGKILL)
        wait_until_free(journals)
        assert before.epoch == 2
        finisher = journals.open("task-1")
        assert finisher.append(e.TaskFinished(), at=datetime.now(UTC)).seq == before.seq + 1
        finisher.close()


def test_writer_cannot_write_after_its_handover(journals, tmp_path):
    writer = journals.open("task-1")
    with (
        journals.hand_over(writer) as lock_fd,
        child_process(ADOPT_PROGRAM, tmp_path, lock_fd, pass_fds=(lock_fd,)) as runner,
    ):
        assert runner.stdout.readline() == "adopted\n"
        with pytest.raises(JournalBusyError):
            writer.append(e.ErrorReported("by the server", ""), at=datetime.now(UTC))
        with pytest.raises(JournalBusyError), journals.hand_over(writer):
            pass
        runner.stdin.write("\n")
        runner.stdin.flush()
        assert runner.stdout.readline() == "written\n"
    writer.close()
    assert [record.seq for record in journals.read("task-1").records] == [1, 2]


def test_writer_continues_after_a_failed_handover(journals):
    writer = journals.open("task-1")
    with pytest.raises(OSError, match="no process"), journals.hand_over(writer):
        raise OSError("no process")
    writer.append(e.ErrorReported("by the server", ""), at=datetime.now(UTC))
    with journals.hand_over(writer) as lock_fd:
        assert lock_fd == writer.lock_fd
    writer.close()


def test_adopting_writer_has_the_next_epoch(journals, tmp_path):
    writer = journals.open("task-1")
    writer.append(e.ErrorReported("by the server", ""), at=datetime.now(UTC))
    with child_process(ADOPT_PROGRAM, tmp_path, writer.lock_fd, pass_fds=(writer.lock_fd,)) as runner:
        writer.close()
        runner.stdin.write("\n")
        runner.stdin.flush()
        assert [runner.stdout.readline() for _ in range(2)] == ["adopted\n", "written\n"]
        numbers = [(record.seq, record.epoch) for record in journals.read("task-1").records]
        assert numbers == [(1, 1), (2, 2), (3, 3)]


def test_adopted_lock_is_not_inheritable(journals):
    writer = journals.open("task-1")
    inherited = os.dup(writer.lock_fd)
    os.set_inheritable(inherited, True)
    adopted = journals.adopt("task-1", inherited)
    assert not os.get_inheritable(adopted.lock_fd)
    writer.close()
    assert journals.lock_state("task-1") is LockState.HELD
    adopted.close()
    assert journals.lock_state("task-1") is LockState.FREE


def test_adopt_rejects_a_file_other_than_the_lock(journals, tmp_path):
    with (tmp_path / "other").open("w") as other, pytest.raises(OSError, match="not the lock"):
        journals.adopt("task-1", other.fileno())


def test_adopt_rejects_a_descriptor_without_the_lock(journals, tmp_path):
    holder = journals.open("task-1")
    with (tmp_path / "tasks/task-1/journal/lock").open("r+") as copy, pytest.raises(JournalBusyError):
        journals.adopt("task-1", copy.fileno())
    holder.close()


@pytest.mark.parametrize("damage", [lambda text: text[:-9] + b"?" + text[-8:], lambda text: text[:20], lambda _: b""])
def test_open_keeps_a_journal_whose_first_record_is_damaged(journals, tmp_path, damage):
    """The first record was flushed before the task was accepted, so it is not a torn tail."""
    records = tmp_path / "tasks/task-1/journal/records"
    damaged = damage(records.read_bytes().splitlines(keepends=True)[0])
    records.write_bytes(damaged)
    with pytest.raises(JournalDamagedError, match="restore"):
        journals.open("task-1")
    assert records.read_bytes() == damaged
    assert journals.lock_state("task-1") is LockState.FREE


def test_checking_lock_state_does_not_block_writers(journals):
    for _ in range(200):
        assert journals.lock_state("task-1") is LockState.FREE
        journals.open("task-1").close()


def test_journal_has_no_gaps_after_kills(journals, tmp_path):
    generator = random.Random(7)
    for _ in range(8):
        with child_process(APPEND_FOREVER_PROGRAM, tmp_path) as runner:
            reported = int(runner.stdout.readline())
            time.sleep(generator.uniform(0, 0.02))
            os.kill(runner.pid, signal.SIGKILL)
            for word in runner.stdout.read().split():
                reported = int(word)
        wait_until_free(journals)
        writer = journals.open("task-1")
        assert writer.last_seq >= reported
        writer.close()

    records, offset = [], 0
    while (batch := journals.read("task-1", offset)).records:
        records += batch.records
        offset = batch.next_offset
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.epoch for record in records] == sorted(record.epoch for record in records)
    assert records[-1].epoch > 8


def test_concurrent_reader_sees_each_record_once(journals, tmp_path):
    with child_process(APPEND_FOREVER_PROGRAM, tmp_path) as runner:
        seqs, offset, deadline = [], 0, time.monotonic() + TIMEOUT_SECONDS
        while len(seqs) < 200:
            assert time.monotonic() < deadline
            batch = journals.read("task-1", offset, bytes_max=50_000)
            offset = batch.next_offset
            seqs += [record.seq for record in batch.records]
            if runner.poll() is not None:
                pytest.fail("the writer has ended")
            if not batch.records:
                runner.stdout.readline()
    assert seqs == list(range(1, len(seqs) + 1))


def test_record_appended_during_a_flush_is_flushed_next(journals, monkeypatch):
    """A runner flushes output in a thread while it continues to write."""
    flushed = []
    with closing(journals.open("task-1")) as writer:
        writer.append(e.ErrorReported("second", ""), at=datetime.now(UTC))

        def slow_flush(_):
            if not flushed:
                flushed.append("first")
                writer.append(e.ErrorReported("third", ""), at=datetime.now(UTC))
            else:
                flushed.append("again")

        monkeypatch.setattr(os, "fdatasync", slow_flush)
        writer.sync()
        writer.sync()
        assert flushed == ["first", "again"]


def test_durable_record_is_flushed_despite_a_concurrent_flush(journals, monkeypatch):
    """The concurrent flush may have started before the record was written."""
    flushed = []
    with closing(journals.open("task-1")) as writer:
        writer.append(e.ErrorReported("second", ""), at=datetime.now(UTC))
        monkeypatch.setattr(os, "fdatasync", lambda _: flushed.append(1))
        write = os.write

        def write_while_another_flushes(descriptor, data):
            written = write(descriptor, data)
            writer.sync()
            return written

        monkeypatch.setattr(os, "write", write_while_another_flushes)
        writer.append(e.TaskFinished(), at=datetime.now(UTC), durable=True)
        assert len(flushed) == 2


class FailingPageCache:
    """Simulates the kernel's page cache: after a failed flush, data counts as written, and the error is reported once.

    refusals: the number of flushes that fail.
    """

    def __init__(self, monkeypatch, refusals):
        self.refusals, self._dirty, self._stored = refusals, set(), set()
        self._write, self._pwrite = os.write, os.pwrite
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "fdatasync", self.flush)

    def write(self, descriptor, data):
        start = os.fstat(descriptor).st_size
        self._dirty.update(range(start, start + len(data)))
        return self._write(descriptor, data)

    def pwrite(self, descriptor, data, offset):
        self._dirty.update(range(offset, offset + len(data)))
        return self._pwrite(descriptor, data, offset)

    def flush(self, _):
        dirty, self._dirty = self._dirty, set()
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EIO, "Input/output error")
        self._stored |= dirty

    def missing(self, start, records):
        return set(range(start, records.stat().st_size)) - self._stored


@pytest.mark.parametrize("concurrent_flushes", [1, 2])
def test_durable_record_is_stored_despite_a_failed_concurrent_flush(
    journals, tmp_path, monkeypatch, concurrent_flushes
):
    """The second concurrent flush succeeds, but it started before the record was written."""
    records = tmp_path / "tasks" / "task-1" / "journal" / "records"
    with closing(journals.open("task-1")) as writer:
        writer.sync()
        start = records.stat().st_size
        disk = FailingPageCache(monkeypatch, refusals=1)
        write = os.write

        def write_while_another_flushes(descriptor, data):
            written = write(descriptor, data)
            for _ in range(concurrent_flushes):
                with contextlib.suppress(OSError):
                    writer.sync()
            return written

        writer.append(e.ErrorReported("second", ""), at=datetime.now(UTC))
        monkeypatch.setattr(os, "write", write_while_another_flushes)
        writer.append(e.TaskFinished(), at=datetime.now(UTC), durable=True)
        assert not disk.refusals
        assert not disk.missing(start, records)


def test_retries_on_a_failing_disk_rewrite_one_chunk_each(journals, tmp_path, monkeypatch):
    """A finisher rewrites all records, because earlier writers may not have flushed them.

    Each retry rewrites one chunk.
    """
    monkeypatch.setattr("sandbox.journal.writer._REWRITE_CHUNK_BYTES", 1000)
    records = tmp_path / "tasks" / "task-1" / "journal" / "records"
    with closing(journals.open("task-1")) as writer:
        for _ in range(10):
            writer.append(e.Output.from_bytes("stdout", b"x" * 2000), at=datetime.now(UTC))
    with closing(journals.open("task-1")) as writer:
        disk, written = FailingPageCache(monkeypatch, refusals=5), []
        pwrite = os.pwrite

        def record_pwrite(descriptor, data, offset):
            written.append(len(data))
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", record_pwrite)
        for _ in range(5):
            with pytest.raises(OSError, match="Input/output"):
                writer.append(e.TaskFinished(), at=datetime.now(UTC), durable=True)
        assert sum(written) <= 5 * 1000
        writer.append(e.TaskFinished(), at=datetime.now(UTC), durable=True)
        assert not disk.missing(0, records)


def test_partial_rewrite_is_continued(journals, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.journal.writer._REWRITE_CHUNK_BYTES", 1000)
    records = tmp_path / "tasks" / "task-1" / "journal" / "records"
    with closing(journals.open("task-1")) as writer:
        for _ in range(10):
            writer.append(e.Output.from_bytes("stdout", b"x" * 2000), at=datetime.now(UTC))
        disk, flush = FailingPageCache(monkeypatch, refusals=1), os.fdatasync
        flushes = []

        def fail_periodically(descriptor):
            flushes.append(1)
            disk.refusals += len(flushes) % 5 == 0
            flush(descriptor)

        monkeypatch.setattr(os, "fdatasync", fail_periodically)
        attempts = 0
        while True:
            attempts += 1
            with contextlib.suppress(OSError):
                writer.append(e.TaskFinished(), at=datetime.now(UTC), durable=True)
                break
        assert 4 < attempts < 15
        assert not disk.missing(0, records)
        disk.refusals = 0
        monkeypatch.setattr(os, "fdatasync", flush)


def test_record_after_a_truncated_one_is_not_assumed_to_be_flushed(journals, tmp_path, monkeypatch):
    """The bytes of the truncated record were rewritten and flushed; only the last flush failed."""
    records = tmp_path / "tasks" / "task-1" / "journal" / "records"
    with closing(journals.open("task-1")) as writer:
        writer.append(e.ErrorReported("first", ""), at=datetime.now(UTC))
        disk, flush = FailingPageCache(monkeypatch, refusals=1), os.fdatasync
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
        outcomes = iter([False, True])

        def fail_the_last(descriptor):
            disk.refusals = next(outcomes, False)
            flush(descriptor)

        monkeypatch.setattr(os, "fdatasync", fail_the_last)
        with pytest.raises(OSError, match="Input/output"):
            writer.append(e.ErrorReported("second, which is long", "x" * 500), at=datetime.now(UTC), durable=True)
        monkeypatch.setattr(os, "fdatasync", flush)
        disk.refusals = 1
        writer.append(e.ErrorReported("third", ""), at=datetime.now(UTC))
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
        writer.sync()
        assert not disk.missing(0, records)
