"""The contract between the writer and the readers of a journal."""

import contextlib
import os
import resource
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)


@pytest.fixture(params=[FileJournals])
def journals(request, tmp_path):
    return request.param(tmp_path)


def make_output(text):
    return e.Output.from_bytes("stdout", text.encode() + b"\n")


def output_lines(batch):
    return [record.event.display_text.rstrip("\n") for record in batch.records]


@contextlib.contextmanager
def open_writer(journals, task_id="task-1"):
    writer = journals.create(task_id)
    try:
        yield writer
    finally:
        writer.close()


def test_records_are_numbered_and_immediately_visible(journals):
    with open_writer(journals) as writer:
        assert writer.last_seq == 0
        first = writer.append(make_output("one"), at=TIMESTAMP, durable=True)
        batch = journals.read("task-1")
        assert (list(batch.records), first.seq, first.epoch, writer.last_seq) == ([first], 1, 1, 1)

        writer.append(make_output("two"), at=TIMESTAMP)
        assert output_lines(journals.read("task-1", batch.next_offset)) == ["two"]


def test_each_writer_has_a_new_epoch(journals):
    for epoch in (1, 2, 3):
        writer = journals.create("task-1") if epoch == 1 else journals.open("task-1")
        record = writer.append(make_output("x"), at=TIMESTAMP)
        assert (record.seq, record.epoch) == (epoch, epoch)
        writer.close()


def test_creating_a_journal_twice_fails(journals):
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
        with pytest.raises(FileExistsError):
            journals.create("task-1")
    with pytest.raises(FileExistsError):
        journals.create("task-1")
    assert output_lines(journals.read("task-1")) == ["x"]


def test_journal_without_records_is_not_listed(journals):
    with open_writer(journals):
        pass
    assert journals.task_ids() == []

    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)

    assert journals.task_ids() == ["task-1"]


def test_second_writer_is_rejected(journals):
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
        assert journals.lock_state("task-1") is LockState.HELD
        with pytest.raises(JournalBusyError):
            journals.open("task-1")
    assert journals.lock_state("task-1") is LockState.FREE
    journals.open("task-1").close()


def test_close_is_idempotent(journals):
    with open_writer(journals) as writer:
        writer.close()
    assert journals.lock_state("task-1") is LockState.FREE


def test_read_stops_at_the_byte_limit_after_at_least_one_record(journals):
    with open_writer(journals) as writer:
        writer.append(make_output("short"), at=TIMESTAMP)
        writer.append(make_output("long" * 50_000), at=TIMESTAMP)
        writer.append(make_output("end"), at=TIMESTAMP)

    first = journals.read("task-1", bytes_max=1000)
    second = journals.read("task-1", first.next_offset, bytes_max=1000)
    third = journals.read("task-1", second.next_offset, bytes_max=1000)

    assert output_lines(first) == ["short"]
    assert output_lines(second)[0] == "long" * 50_000
    assert output_lines(second) + output_lines(third) == ["long" * 50_000, "end"]
    assert len(journals.read("task-1").records) == 3


def test_read_can_start_at_any_record(journals):
    with open_writer(journals) as writer:
        assert journals.find_offset("task-1", 1) == 0
        for text in ("one", "two" * 50_000, "three"):
            writer.append(make_output(text), at=TIMESTAMP)
        offsets = [journals.find_offset("task-1", seq) for seq in (1, 2, 3, 4, 99)]
        first_texts = [output_lines(journals.read("task-1", offset))[0] for offset in offsets[:3]]
        assert first_texts == ["one", "two" * 50_000, "three"]
        assert offsets[0] == 0
        assert offsets[3:] == [journals.read("task-1").next_offset] * 2

        writer.append(make_output("four"), at=TIMESTAMP)
        assert output_lines(journals.read("task-1", offsets[3])) == ["four"]


@pytest.mark.parametrize("task_id", ["", ".", "..", "../up", "a/b", "a..b", "/etc", "a\0b", ".hidden", "a\n", "a."])
def test_invalid_task_id_is_not_found(journals, tmp_path, task_id):
    (tmp_path / "tasks").mkdir()
    for operation in (
        journals.create,
        journals.open,
        journals.read,
        journals.lock_state,
        lambda name: journals.find_offset(name, 1),
    ):
        with pytest.raises(FileNotFoundError):
            operation(task_id)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["tasks"]


@pytest.mark.parametrize("task_id", ["a", "Fix-42_b.c", "0" * 128])
def test_valid_task_id_is_accepted(journals, task_id):
    with open_writer(journals, task_id) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    assert journals.task_ids() == [task_id]


def test_unknown_task_has_no_journal(journals):
    assert journals.task_ids() == []
    assert journals.lock_state("task-1") is LockState.FREE
    for operation in (journals.open, journals.read, lambda name: journals.find_offset(name, 1)):
        with pytest.raises(FileNotFoundError):
            operation("task-1")


def test_unrelated_files_are_not_listed(journals, tmp_path):
    with open_writer(journals, "b") as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    with open_writer(journals, "a") as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    (tmp_path / "tasks" / "file").write_text("x")
    (tmp_path / "tasks" / "empty").mkdir()

    assert journals.task_ids() == ["a", "b"]


def test_journal_with_a_directory_in_place_of_records_is_listed(journals, tmp_path):
    with open_writer(journals, "a") as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    (tmp_path / "tasks" / "b" / "journal" / "records").mkdir(parents=True)

    assert journals.task_ids() == ["a", "b"]
    with pytest.raises(IsADirectoryError):
        journals.read("b")


def test_files_are_accessible_to_the_owner_only(journals, tmp_path):
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    for path in (tmp_path / "tasks").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_descriptors_are_not_inheritable(journals):
    with open_writer(journals) as writer:
        journal_fds = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "/task-1/" in str(entry.readlink()):
                    journal_fds.add(int(entry.name))
        assert writer.lock_fd in journal_fds
        assert len(journal_fds) == 2
        assert not any(os.get_inheritable(fd) for fd in journal_fds)


@contextlib.contextmanager
def file_size_limit(size_bytes):
    """Limit file sizes. A write stores the data that fits and then fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_record_that_does_not_fit_is_removed(journals):
    with open_writer(journals) as writer:
        writer.append(make_output("one"), at=TIMESTAMP)
        end = journals.read("task-1").next_offset
        with file_size_limit(end + 100), pytest.raises(OSError, match="File too large"):
            writer.append(make_output("x" * 5000), at=TIMESTAMP)

        assert writer.last_seq == 1
        assert output_lines(journals.read("task-1")) == ["one"]
        assert writer.append(make_output("two"), at=TIMESTAMP).seq == 2
        assert output_lines(journals.read("task-1")) == ["one", "two"]


def test_record_that_cannot_be_flushed_is_removed(journals, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    with open_writer(journals) as writer:
        writer.append(make_output("one"), at=TIMESTAMP)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(make_output("lost"), at=TIMESTAMP, durable=True)
        assert writer.append(make_output("two"), at=TIMESTAMP).seq == 2
        assert output_lines(journals.read("task-1")) == ["one", "two"]


def test_next_append_retries_a_failed_cleanup(journals, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with open_writer(journals) as writer:
        writer.append(make_output("one"), at=TIMESTAMP)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            patched.setattr(os, "ftruncate", fail)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(make_output("lost"), at=TIMESTAMP, durable=True)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(make_output("lost"), at=TIMESTAMP)
        assert writer.append(make_output("two"), at=TIMESTAMP).seq == 2
        assert output_lines(journals.read("task-1")) == ["one", "two"]


def task_files(tmp_path):
    return [path.name for path in (tmp_path / "tasks").rglob("*")]


@contextlib.contextmanager
def limited_descriptors(count):
    lowest_free = os.dup(0)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [0, 1])
def test_create_without_free_descriptors_leaves_no_files(journals, tmp_path, count):
    with limited_descriptors(count), pytest.raises(OSError, match="Too many open files"):
        journals.create("task-1")
    assert task_files(tmp_path) == []
    journals.create("task-1").close()


def test_create_on_a_full_disk_leaves_no_files(journals, tmp_path, monkeypatch):
    mkdir = os.mkdir

    def fail(target, *rest):
        if not str(target).endswith("/journal"):
            return mkdir(target, *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.mkdir", fail)
        with pytest.raises(OSError, match="No space left"):
            journals.create("task-1")
    assert task_files(tmp_path) == []
    journals.create("task-1").close()


def test_discarded_journal_is_removed_and_can_be_recreated(journals, tmp_path):
    writer = journals.create("task-1")
    journals.discard("task-1", writer)
    assert task_files(tmp_path) == []
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    assert journals.task_ids() == ["task-1"]


def test_discard_keeps_a_journal_created_during_the_removal(journals, tmp_path, monkeypatch):
    """Another process creates the journal between the release of the lock and the removal of the directory."""
    discarded, new_writers, rmdir = journals.create("task-1"), [], Path.rmdir

    def create_before_rmdir(directory):
        if not new_writers:
            new_writers.append(journals.create("task-1"))
            new_writers[0].append(make_output("x"), at=TIMESTAMP)
        rmdir(directory)

    monkeypatch.setattr(Path, "rmdir", create_before_rmdir)
    journals.discard("task-1", discarded)
    assert journals.lock_state("task-1") is LockState.HELD
    assert output_lines(journals.read("task-1")) == ["x"]
    new_writers[0].close()


def test_discard_keeps_a_journal_that_replaced_the_discarded_one(journals, tmp_path):
    discarded = journals.create("task-1")
    shutil.rmtree(tmp_path / "tasks" / "task-1")
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
        journals.discard("task-1", discarded)
        assert output_lines(journals.read("task-1")) == ["x"]


def test_event_that_cannot_be_encoded_is_not_written(journals):
    with open_writer(journals) as writer:
        with pytest.raises(UnicodeEncodeError):
            writer.append(e.ErrorReported("x", "\ud800"), at=TIMESTAMP)
        assert writer.append(make_output("one"), at=TIMESTAMP).seq == 1


def test_sync_without_new_records_does_not_flush(journals, monkeypatch):
    flushed = []
    with open_writer(journals) as writer:
        monkeypatch.setattr(os, "fdatasync", flushed.append)
        writer.sync()
        assert len(flushed) == 0
        writer.append(make_output("x"), at=TIMESTAMP)
        assert len(flushed) == 0
        writer.sync()
        writer.sync()
        assert len(flushed) == 1
        writer.append(make_output("x"), at=TIMESTAMP, durable=True)
        writer.sync()
        assert len(flushed) == 2


def test_open_flushes_records_of_a_dead_writer(journals, monkeypatch):
    with open_writer(journals) as writer:
        writer.append(make_output("written, perhaps not on disk"), at=TIMESTAMP)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    writer = journals.open("task-1")
    writer.close()
    assert len(flushed) == 1


def test_first_record_flushes_all_directories(journals, tmp_path, monkeypatch):
    flushed = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    with open_writer(journals) as writer:
        assert flushed == [tmp_path]
        writer.append(make_output("x"), at=TIMESTAMP, durable=True)
        directory = tmp_path / "tasks" / "task-1" / "journal"
        assert flushed[1:] == [directory / "records", directory, *directory.parents[:2]]
        writer.append(make_output("y"), at=TIMESTAMP, durable=True)
    assert flushed[5:] == [directory / "records"]
    flushed.clear()
    journals.create("task-2").close()
    assert tmp_path not in flushed


def test_open_flushes_the_directories_of_a_writer_that_died_after_record_1(journals, tmp_path, monkeypatch):
    with open_writer(journals) as writer:
        writer.append(make_output("x"), at=TIMESTAMP)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    directory = tmp_path / "tasks" / "task-1" / "journal"
    with contextlib.closing(journals.open("task-1")) as writer:
        writer.append(make_output("y"), at=TIMESTAMP, durable=True)
        assert flushed == [directory, *directory.parents[:2]]
        writer.append(make_output("z"), at=TIMESTAMP, durable=True)
    journals.open("task-1").close()
    assert len(flushed) == 3


def test_first_record_is_dropped_if_a_directory_cannot_be_flushed(journals, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            journals.create("task-1")
    assert task_files(tmp_path) == []
    writer = journals.create("task-1")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            writer.append(make_output("x"), at=TIMESTAMP, durable=True)
    assert journals.task_ids() == []
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    writer.append(make_output("x"), at=TIMESTAMP, durable=True)
    assert len(flushed) == 3
    writer.close()
    assert output_lines(journals.read("task-1")) == ["x"]
