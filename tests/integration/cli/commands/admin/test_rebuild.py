"""`sandbox admin rebuild` makes the index of nothing but the journals, while no server is there."""

import itertools
import json
import os
import sqlite3
from pathlib import Path

import pytest

from doubles.stored_tasks import KeptTasks
from sandbox.bootstrap import administration
from sandbox.bootstrap.administration import rebuild_index
from sandbox.bootstrap.data_dir_lock import lock_data_dir
from sandbox.interfaces.store import IndexedTask, TaskQuery


@pytest.fixture
def kept(tmp_path):
    made = KeptTasks(tmp_path / "data")
    for number in range(1, 6):
        made.finish(f"task-{number}", labels={"number": str(number)})
    made.run("task-6").writer.close()
    made.index()
    return made


@pytest.fixture
def admin(sandbox, kept):
    def run(command, *options):
        return sandbox("admin", command, "--data-dir", str(kept.data_dir), "--format", "json", *options)

    return run


def rows(kept):
    store = kept.store()
    known = {task_id: store.load(task_id) for task_id in store.task_ids()}
    labelled = store.query(TaskQuery(labels={"number": "3"})).total_count
    store.close()
    return known, labelled


@pytest.mark.parametrize("harm", ["gone", "no database", "wrong", "a newer one", "left half way"])
def test_whatever_happened_to_the_index_it_is_as_before(admin, kept, harm):
    before, index = rows(kept), kept.data_dir / "index.sqlite"
    if harm == "gone":
        index.unlink()
    elif harm == "no database":
        index.write_bytes(os.urandom(20_000))
        (kept.data_dir / "index.sqlite-wal").write_bytes(os.urandom(20_000))
    elif harm == "a newer one":
        connection = sqlite3.connect(index)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    elif harm == "left half way":
        (kept.data_dir / "index.sqlite.new").write_bytes(b"half")
        (kept.data_dir / "index.sqlite.new-wal").write_bytes(b"half")
    else:
        store = kept.store()
        store.save(IndexedTask(store.load("task-6").task, 1))
        store.close()

    done = admin("rebuild")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"tasks": 6, "refused": {}}
    assert admin("check", "--deep").returncode == 0
    assert rows(kept) == before
    assert sorted(path.name for path in kept.data_dir.glob("index.sqlite*")) == [
        "index.sqlite",
        *(["index.sqlite.before"] if harm != "gone" else []),
    ]


def test_a_damaged_journal_is_told_and_kept_and_costs_no_other_task_anything(admin, kept, sandbox):
    data = bytearray(kept.records("task-2").read_bytes())
    data[200] ^= 1
    kept.records("task-2").write_bytes(data)
    (kept.data_dir / "tasks" / "task-4").rename(kept.data_dir / "tasks" / "somebody-elses")

    done = admin("rebuild")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["tasks"], sorted(told["refused"])) == (4, ["somebody-elses", "task-2"])
    assert kept.records("task-2").read_bytes() == data
    assert set(rows(kept)[0]) == {"task-1", "task-3", "task-5", "task-6"}
    plain = sandbox("admin", "rebuild", "--data-dir", str(kept.data_dir))
    assert b"task-2  The record at byte" in plain.stdout
    assert b"2 could not be read" in plain.stderr


def test_beside_a_server_nothing_is_touched_and_it_says_so(admin, kept):
    with lock_data_dir(kept.data_dir):
        before = (kept.data_dir / "index.sqlite").read_bytes()
        refused = admin("rebuild")
    assert refused.returncode == 4
    assert str(os.getpid()).encode() in refused.stderr
    assert b"stop it" in refused.stderr
    assert (kept.data_dir / "index.sqlite").read_bytes() == before
    assert not (kept.data_dir / "index.sqlite.new").exists()


def test_what_a_full_disk_breaks_off_leaves_nothing_and_the_index_as_it_was(kept, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    before, index = rows(kept), (kept.data_dir / "index.sqlite").read_bytes()
    monkeypatch.setattr("sandbox.bootstrap.administration.index_journals", refuse)
    with pytest.raises(OSError, match="No space"):
        rebuild_index(kept.data_dir)
    assert list(kept.data_dir.glob("index.sqlite.*")) == []
    assert (kept.data_dir / "index.sqlite").read_bytes() == index
    assert rows(kept) == before


def test_a_disk_without_hard_links_keeps_the_index_before_as_a_copy(kept, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    before = rows(kept)
    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        index = (kept.data_dir / "index.sqlite").read_bytes()
        assert rebuild_index(kept.data_dir).tasks_count == 6
        assert (kept.data_dir / "index.sqlite.before").read_bytes() == index
    assert rows(kept) == before
    kept_files = sorted(kept.data_dir.glob("index.sqlite*"))
    assert [path.name for path in kept_files] == ["index.sqlite", "index.sqlite.before"]
    assert {path.stat().st_mode & 0o777 for path in kept_files} == {0o600}


def test_the_index_before_stays_until_there_is_another(kept, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    rebuild_index(kept.data_dir)
    before = (kept.data_dir / "index.sqlite.before").read_bytes()
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space"):
        rebuild_index(kept.data_dir)
    assert (kept.data_dir / "index.sqlite.before").read_bytes() == before
    assert sorted(path.name for path in kept.data_dir.glob("index.sqlite*")) == ["index.sqlite", "index.sqlite.before"]


def test_a_rebuild_that_ended_between_the_two_names_is_done_again(kept):
    os.link(kept.data_dir / "index.sqlite", kept.data_dir / "index.sqlite.before")
    rebuild_index(kept.data_dir)
    assert sorted(path.name for path in kept.data_dir.glob("index.sqlite*")) == ["index.sqlite", "index.sqlite.before"]


@pytest.fixture
def killed(kept):
    """What a server leaves that was killed: one task is in the index's log and not in the index."""
    store = kept.store()
    indexed = store.load("task-1")
    assert indexed is not None
    store.delete("task-1")
    store.close()
    store = kept.store()
    store.save(indexed)
    files = {name: (kept.data_dir / name).read_bytes() for name in ("index.sqlite", "index.sqlite-wal")}
    store.close()

    def lay_out():
        for left in kept.data_dir.glob("index.sqlite*"):
            left.unlink()
        for name, content in files.items():
            (kept.data_dir / name).write_bytes(content)

    return lay_out


class CrashError(BaseException):
    """The process ends here."""


def crash_at(step, monkeypatch):
    """Let the exchange of the two files end before its so-manieth step on the disk."""
    steps, replace = itertools.count(1), administration._replace_index

    def dying(real):
        def carry_out(*arguments, **options):
            if next(steps) == step:
                raise CrashError
            return real(*arguments, **options)

        return carry_out

    def replace_and_die(index, new):
        with monkeypatch.context() as patched:
            for owner, name in ((Path, "unlink"), (Path, "rename"), (os, "link")):
                patched.setattr(owner, name, dying(getattr(owner, name)))
            replace(index, new)

    monkeypatch.setattr(administration, "_replace_index", replace_and_die)


def test_a_crash_at_any_step_leaves_the_old_index_with_its_log_or_the_new_one(kept, killed, monkeypatch):
    before = rows(kept)
    for step in itertools.count(1):
        killed()
        with monkeypatch.context() as patched:
            crash_at(step, patched)
            try:
                rebuild_index(kept.data_dir)
                break
            except CrashError:
                assert rows(kept) == before
    assert step > 3
    assert rows(kept) == before
