"""`sandbox admin rebuild` creates the index from the journals, without a server."""

import itertools
import json
import os
import sqlite3
from pathlib import Path

import pytest

from doubles.stored_tasks import StoredTasks
from sandbox.bootstrap import data_dir_maintenance
from sandbox.bootstrap.data_dir_maintenance import rebuild_index
from sandbox.bootstrap.private_directories import lock_data_dir
from sandbox.interfaces.store import IndexedTask, TaskQuery


@pytest.fixture
def stored(tmp_path):
    tasks = StoredTasks(tmp_path / "data")
    for number in range(1, 6):
        tasks.add_completed_task(f"task-{number}", labels={"number": str(number)})
    tasks.add_running_task("task-6").writer.close()
    tasks.index()
    return tasks


@pytest.fixture
def admin(run_cli, stored):
    def run(command, *options):
        return run_cli("admin", command, "--data-dir", str(stored.data_dir), "--format", "json", *options)

    return run


def rows(stored):
    store = stored.open_store()
    indexed_tasks = {task_id: store.load(task_id) for task_id in store.task_ids()}
    labelled_count = store.query(TaskQuery(labels={"number": "3"})).total_count
    store.close()
    return indexed_tasks, labelled_count


@pytest.mark.parametrize("damage", ["missing", "not a database", "stale", "newer version", "interrupted rebuild"])
def test_rebuild_restores_a_damaged_index(admin, stored, damage):
    before, index = rows(stored), stored.data_dir / "index.sqlite"
    if damage == "missing":
        index.unlink()
    elif damage == "not a database":
        index.write_bytes(os.urandom(20_000))
        (stored.data_dir / "index.sqlite-wal").write_bytes(os.urandom(20_000))
    elif damage == "newer version":
        connection = sqlite3.connect(index)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    elif damage == "interrupted rebuild":
        (stored.data_dir / "index.sqlite.new").write_bytes(b"half")
        (stored.data_dir / "index.sqlite.new-wal").write_bytes(b"half")
    else:
        store = stored.open_store()
        store.save(IndexedTask(store.load("task-6").task, 1))
        store.close()

    result = admin("rebuild")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"tasks": 6, "refused": {}}
    assert admin("check", "--deep").returncode == 0
    assert rows(stored) == before
    assert sorted(path.name for path in stored.data_dir.glob("index.sqlite*")) == [
        "index.sqlite",
        *(["index.sqlite.before"] if damage != "missing" else []),
    ]


def test_damaged_journal_is_reported_and_others_are_indexed(admin, stored, run_cli):
    data = bytearray(stored.records("task-2").read_bytes())
    data[200] ^= 1
    stored.records("task-2").write_bytes(data)
    (stored.data_dir / "tasks" / "task-4").rename(stored.data_dir / "tasks" / "foreign-task")

    result = admin("rebuild")
    assert result.returncode == 1
    summary = json.loads(result.stdout)
    assert (summary["tasks"], sorted(summary["refused"])) == (4, ["foreign-task", "task-2"])
    assert stored.records("task-2").read_bytes() == data
    assert set(rows(stored)[0]) == {"task-1", "task-3", "task-5", "task-6"}
    plain = run_cli("admin", "rebuild", "--data-dir", str(stored.data_dir))
    assert b"task-2  The record at byte" in plain.stdout
    assert b"2 could not be read" in plain.stderr


def test_damaged_first_record_is_reported_and_kept(admin, stored):
    records = stored.records("task-6")
    line = records.read_bytes().splitlines(keepends=True)[0]
    damaged = line[:-9] + b"?" + line[-8:]
    records.write_bytes(damaged)
    found = admin("check")
    assert (found.returncode, b"journal_damaged" in found.stdout) == (1, True)
    rebuilt = admin("rebuild")
    assert rebuilt.returncode == 1
    assert list(json.loads(rebuilt.stdout)["refused"]) == ["task-6"]
    assert records.read_bytes() == damaged


def test_rebuild_with_a_running_server_is_rejected(admin, stored):
    with lock_data_dir(stored.data_dir):
        before = (stored.data_dir / "index.sqlite").read_bytes()
        result = admin("rebuild")
    assert result.returncode == 4
    assert str(os.getpid()).encode() in result.stderr
    assert b"stop it" in result.stderr
    assert (stored.data_dir / "index.sqlite").read_bytes() == before
    assert not (stored.data_dir / "index.sqlite.new").exists()


def test_full_disk_keeps_the_index_and_leaves_no_files(stored, monkeypatch):
    def raise_error(*_, **__):
        raise OSError(28, "No space left on device")

    before, index = rows(stored), (stored.data_dir / "index.sqlite").read_bytes()
    monkeypatch.setattr("sandbox.bootstrap.data_dir_maintenance.index_journals", raise_error)
    with pytest.raises(OSError, match="No space"):
        rebuild_index(stored.data_dir)
    assert list(stored.data_dir.glob("index.sqlite.*")) == []
    assert (stored.data_dir / "index.sqlite").read_bytes() == index
    assert rows(stored) == before


def test_previous_index_is_copied_without_hard_links(stored, monkeypatch):
    def raise_error(*_):
        raise PermissionError(1, "Operation not permitted")

    before = rows(stored)
    monkeypatch.setattr(os, "link", raise_error)
    for _ in range(2):
        index = (stored.data_dir / "index.sqlite").read_bytes()
        assert rebuild_index(stored.data_dir).tasks_count == 6
        assert (stored.data_dir / "index.sqlite.before").read_bytes() == index
    assert rows(stored) == before
    files = sorted(stored.data_dir.glob("index.sqlite*"))
    assert [path.name for path in files] == ["index.sqlite", "index.sqlite.before"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_previous_index_is_kept_until_it_is_replaced(stored, monkeypatch):
    def raise_error(*_):
        raise OSError(28, "No space left on device")

    rebuild_index(stored.data_dir)
    before = (stored.data_dir / "index.sqlite.before").read_bytes()
    monkeypatch.setattr(os, "link", raise_error)
    with pytest.raises(OSError, match="No space"):
        rebuild_index(stored.data_dir)
    assert (stored.data_dir / "index.sqlite.before").read_bytes() == before
    assert sorted(path.name for path in stored.data_dir.glob("index.sqlite*")) == [
        "index.sqlite",
        "index.sqlite.before",
    ]


def test_rebuild_recovers_from_an_interrupted_replacement(stored):
    os.link(stored.data_dir / "index.sqlite", stored.data_dir / "index.sqlite.before")
    rebuild_index(stored.data_dir)
    assert sorted(path.name for path in stored.data_dir.glob("index.sqlite*")) == [
        "index.sqlite",
        "index.sqlite.before",
    ]


@pytest.fixture
def restore_killed_index(stored):
    """Return a function that restores the index of a killed server, in which one task is only in the WAL."""
    store = stored.open_store()
    indexed = store.load("task-1")
    assert indexed is not None
    store.delete("task-1")
    store.close()
    store = stored.open_store()
    store.save(indexed)
    files = {name: (stored.data_dir / name).read_bytes() for name in ("index.sqlite", "index.sqlite-wal")}
    store.close()

    def write_files():
        for leftover in stored.data_dir.glob("index.sqlite*"):
            leftover.unlink()
        for name, content in files.items():
            (stored.data_dir / name).write_bytes(content)

    return write_files


class CrashError(BaseException):
    """A simulated crash of the process."""


def crash_at(step, monkeypatch):
    """Crash before the given file operation of the index replacement."""
    steps, replace = itertools.count(1), data_dir_maintenance._replace_index

    def crashing(real):
        def call(*arguments, **options):
            if next(steps) == step:
                raise CrashError
            return real(*arguments, **options)

        return call

    def replace_and_crash(index, new):
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "rename"), (os, "link")):
                patch.setattr(owner, name, crashing(getattr(owner, name)))
            replace(index, new)

    monkeypatch.setattr(data_dir_maintenance, "_replace_index", replace_and_crash)


def test_crash_at_any_step_leaves_the_old_or_the_new_index(stored, restore_killed_index, monkeypatch):
    before = rows(stored)
    for step in itertools.count(1):
        restore_killed_index()
        with monkeypatch.context() as patch:
            crash_at(step, patch)
            try:
                rebuild_index(stored.data_dir)
                break
            except CrashError:
                assert rows(stored) == before
    assert step > 3
    assert rows(stored) == before
