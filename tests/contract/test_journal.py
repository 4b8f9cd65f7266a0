"""A journal as its writer and its readers know it."""

import contextlib
import os
import resource
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalBusyError
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e

AT = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)


@pytest.fixture(params=[FileJournals])
def journals(request, tmp_path):
    return request.param(tmp_path)


def line(text):
    return e.Output.from_bytes("stdout", text.encode() + b"\n")


def texts(batch):
    return [record.event.display_text.rstrip("\n") for record in batch.records]


@contextlib.contextmanager
def writing(journals, task_id="task-1"):
    writer = journals.create(task_id)
    try:
        yield writer
    finally:
        writer.close()


def test_records_are_numbered_and_seen_at_once(journals):
    with writing(journals) as writer:
        assert writer.last_seq == 0
        first = writer.append(line("one"), at=AT, durable=True)
        batch = journals.read("task-1")
        assert (list(batch.records), first.seq, first.epoch, writer.last_seq) == ([first], 1, 1, 1)

        writer.append(line("two"), at=AT)
        assert texts(journals.read("task-1", batch.next_offset)) == ["two"]


def test_each_writer_is_an_epoch(journals):
    for epoch in (1, 2, 3):
        writer = journals.create("task-1") if epoch == 1 else journals.open("task-1")
        record = writer.append(line("x"), at=AT)
        assert (record.seq, record.epoch) == (epoch, epoch)
        writer.close()


def test_a_task_has_one_journal(journals):
    with writing(journals) as writer:
        writer.append(line("x"), at=AT)
        with pytest.raises(FileExistsError):
            journals.create("task-1")
    with pytest.raises(FileExistsError):
        journals.create("task-1")
    assert texts(journals.read("task-1")) == ["x"]


def test_a_journal_without_record_1_was_never_promised(journals):
    with writing(journals):
        pass
    assert journals.task_ids() == []

    with writing(journals) as writer:
        writer.append(line("x"), at=AT)

    assert journals.task_ids() == ["task-1"]


def test_there_is_one_writer_at_a_time(journals):
    with writing(journals) as writer:
        writer.append(line("x"), at=AT)
        assert journals.is_locked("task-1")
        with pytest.raises(JournalBusyError):
            journals.open("task-1")
    assert not journals.is_locked("task-1")
    journals.open("task-1").close()


def test_closing_twice_is_fine(journals):
    with writing(journals) as writer:
        writer.close()
    assert not journals.is_locked("task-1")


def test_a_reader_gets_about_as_much_as_it_asks_for(journals):
    with writing(journals) as writer:
        writer.append(line("short"), at=AT)
        writer.append(line("long" * 50_000), at=AT)
        writer.append(line("end"), at=AT)

    first = journals.read("task-1", bytes_max=1000)
    second = journals.read("task-1", first.next_offset, bytes_max=1000)
    third = journals.read("task-1", second.next_offset, bytes_max=1000)

    assert texts(first) == ["short"]
    assert texts(second)[0] == "long" * 50_000
    assert texts(second) + texts(third) == ["long" * 50_000, "end"]
    assert len(journals.read("task-1").records) == 3


def test_a_reader_can_begin_at_any_record(journals):
    with writing(journals) as writer:
        assert journals.find_offset("task-1", 1) == 0
        for text in ("one", "two" * 50_000, "three"):
            writer.append(line(text), at=AT)
        places = [journals.find_offset("task-1", seq) for seq in (1, 2, 3, 4, 99)]
        firsts = [texts(journals.read("task-1", place))[0] for place in places[:3]]
        assert firsts == ["one", "two" * 50_000, "three"]
        assert places[0] == 0
        assert places[3:] == [journals.read("task-1").next_offset] * 2

        writer.append(line("four"), at=AT)
        assert texts(journals.read("task-1", places[3])) == ["four"]


@pytest.mark.parametrize("task_id", ["", ".", "..", "../up", "a/b", "a..b", "/etc", "a\0b", ".hidden", "a\n"])
def test_no_id_leads_out_of_the_directory(journals, tmp_path, task_id):
    (tmp_path / "tasks").mkdir()
    for act in (
        journals.create,
        journals.open,
        journals.read,
        journals.is_locked,
        lambda name: journals.find_offset(name, 1),
    ):
        with pytest.raises(FileNotFoundError):
            act(task_id)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["tasks"]


@pytest.mark.parametrize("task_id", ["a", "Fix-42_b.c", "0" * 128])
def test_ids_of_the_manifest_are_taken(journals, task_id):
    with writing(journals, task_id) as writer:
        writer.append(line("x"), at=AT)
    assert journals.task_ids() == [task_id]


def test_an_unknown_task_has_no_journal(journals):
    assert journals.task_ids() == []
    assert not journals.is_locked("task-1")
    for act in (journals.open, journals.read, lambda name: journals.find_offset(name, 1)):
        with pytest.raises(FileNotFoundError):
            act("task-1")


def test_strangers_beside_the_journals_are_no_tasks(journals, tmp_path):
    with writing(journals, "b") as writer:
        writer.append(line("x"), at=AT)
    with writing(journals, "a") as writer:
        writer.append(line("x"), at=AT)
    (tmp_path / "tasks" / "file").write_text("x")
    (tmp_path / "tasks" / "empty").mkdir()

    assert journals.task_ids() == ["a", "b"]


def test_what_stands_where_records_should_be_is_a_task_for_whoever_reads_it_to_find_out(journals, tmp_path):
    with writing(journals, "a") as writer:
        writer.append(line("x"), at=AT)
    (tmp_path / "tasks" / "b" / "journal" / "records").mkdir(parents=True)

    assert journals.task_ids() == ["a", "b"]
    with pytest.raises(IsADirectoryError):
        journals.read("b")


def test_only_the_owner_may_look(journals, tmp_path):
    with writing(journals) as writer:
        writer.append(line("x"), at=AT)
    for path in (tmp_path / "tasks").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_no_descriptor_leaks_to_children(journals):
    with writing(journals) as writer:
        mine = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "/task-1/" in str(entry.readlink()):
                    mine.add(int(entry.name))
        assert writer.lock_fd in mine
        assert len(mine) == 2
        assert not any(os.get_inheritable(fd) for fd in mine)


@contextlib.contextmanager
def file_size_limit(size_bytes):
    """The kernel takes a part of a write that goes over it, then refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_that_does_not_fit_leaves_nothing(journals):
    with writing(journals) as writer:
        writer.append(line("one"), at=AT)
        end = journals.read("task-1").next_offset
        with file_size_limit(end + 100), pytest.raises(OSError, match="File too large"):
            writer.append(line("x" * 5000), at=AT)

        assert writer.last_seq == 1
        assert texts(journals.read("task-1")) == ["one"]
        assert writer.append(line("two"), at=AT).seq == 2
        assert texts(journals.read("task-1")) == ["one", "two"]


def test_a_record_that_cannot_be_made_durable_leaves_nothing(journals, monkeypatch):
    def refuse(_):
        raise OSError(5, "Input/output error")

    with writing(journals) as writer:
        writer.append(line("one"), at=AT)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", refuse)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(line("lost"), at=AT, durable=True)
        assert writer.append(line("two"), at=AT).seq == 2
        assert texts(journals.read("task-1")) == ["one", "two"]


def test_a_failed_clean_up_is_made_good_by_the_next_record(journals, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    with writing(journals) as writer:
        writer.append(line("one"), at=AT)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", refuse)
            patched.setattr(os, "ftruncate", refuse)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(line("lost"), at=AT, durable=True)
            with pytest.raises(OSError, match="Input/output"):
                writer.append(line("lost"), at=AT)
        assert writer.append(line("two"), at=AT).seq == 2
        assert texts(journals.read("task-1")) == ["one", "two"]


def below_tasks(tmp_path):
    return [path.name for path in (tmp_path / "tasks").rglob("*")]


@contextlib.contextmanager
def descriptors_left(count):
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [0, 1])
def test_a_journal_for_which_no_descriptor_is_left_leaves_nothing(journals, tmp_path, count):
    with descriptors_left(count), pytest.raises(OSError, match="Too many open files"):
        journals.create("task-1")
    assert below_tasks(tmp_path) == []
    journals.create("task-1").close()


@pytest.mark.parametrize("step", ["os.fsync", "os.mkdir"])
def test_a_journal_for_which_the_disk_has_no_room_leaves_nothing(journals, tmp_path, monkeypatch, step):
    do = {"os.fsync": os.fsync, "os.mkdir": os.mkdir}[step]

    def refuse(what, *rest):
        if step == "os.mkdir" and not str(what).endswith("/journal"):
            return do(what, *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(step, refuse)
        with pytest.raises(OSError, match="No space left"):
            journals.create("task-1")
    assert below_tasks(tmp_path) == []
    journals.create("task-1").close()


def test_a_journal_that_is_given_up_is_gone_and_can_be_begun_again(journals, tmp_path):
    writer = journals.create("task-1")
    journals.discard("task-1", writer)
    assert below_tasks(tmp_path) == []
    with writing(journals) as writer:
        writer.append(line("x"), at=AT)
    assert journals.task_ids() == ["task-1"]


def test_what_somebody_begins_while_a_journal_is_given_up_stays(journals, tmp_path, monkeypatch):
    """Between the end of the one's lock and that of its directory another one takes the same id."""
    given_up, others, rmdir = journals.create("task-1"), [], Path.rmdir

    def begin_first(directory):
        if not others:
            others.append(journals.create("task-1"))
            others[0].append(line("x"), at=AT)
        rmdir(directory)

    monkeypatch.setattr(Path, "rmdir", begin_first)
    journals.discard("task-1", given_up)
    assert journals.is_locked("task-1")
    assert texts(journals.read("task-1")) == ["x"]
    others[0].close()


def test_what_somebody_has_begun_in_the_place_of_one_that_is_given_up_stays(journals, tmp_path):
    given_up = journals.create("task-1")
    shutil.rmtree(tmp_path / "tasks" / "task-1")
    with writing(journals) as writer:
        writer.append(line("x"), at=AT)
        journals.discard("task-1", given_up)
        assert texts(journals.read("task-1")) == ["x"]


def test_an_event_that_is_no_text_leaves_nothing(journals):
    with writing(journals) as writer:
        with pytest.raises(UnicodeEncodeError):
            writer.append(e.ErrorReported("x", "\ud800"), at=AT)
        assert writer.append(line("one"), at=AT).seq == 1


def test_flushing_costs_nothing_when_there_is_nothing(journals, monkeypatch):
    flushed = []
    with writing(journals) as writer:
        monkeypatch.setattr(os, "fdatasync", flushed.append)
        writer.sync()
        assert len(flushed) == 0
        writer.append(line("x"), at=AT)
        assert len(flushed) == 0
        writer.sync()
        writer.sync()
        assert len(flushed) == 1
        writer.append(line("x"), at=AT, durable=True)
        writer.sync()
        assert len(flushed) == 2


def test_what_a_dead_writer_left_is_flushed_by_the_next_one(journals, monkeypatch):
    with writing(journals) as writer:
        writer.append(line("written, perhaps not on disk"), at=AT)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    writer = journals.open("task-1")
    writer.close()
    assert len(flushed) == 1


def test_a_new_journal_is_on_disk_with_all_its_directories(journals, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    with writing(journals):
        pass
    directory = tmp_path / "tasks" / "task-1" / "journal"
    assert flushed == [directory, *directory.parents[:3]]
