"""`sandbox admin check` reports every discrepancy and changes nothing."""

import hashlib
import json
import os
import shutil

import pytest

from doubles.stored_tasks import StoredTasks
from sandbox.interfaces.store import IndexedTask
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.events import Output


@pytest.fixture
def stored(tmp_path):
    return StoredTasks.with_three_tasks(tmp_path / "data")


@pytest.fixture
def check(run_cli, stored):
    def run(*options):
        result = run_cli("admin", "check", "--data-dir", str(stored.data_dir), "--format", "json", *options)
        assert result.returncode in {0, 1}, result.stderr
        report = json.loads(result.stdout)
        assert report["clean"] == (result.returncode == 0) == (not report["findings"])
        return [(each["task_id"], each["kind"]) for each in report["findings"]]

    return run


def test_consistent_data_directory_has_no_findings(check, run_cli, stored):
    before = snapshot(stored.data_dir)
    assert check("--deep") == []
    plain = run_cli("admin", "check", "--data-dir", str(stored.data_dir))
    assert (plain.returncode, plain.stdout) == (0, b"")
    assert b"3 tasks" in plain.stderr
    assert snapshot(stored.data_dir) == before


def snapshot(directory):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix not in {".sqlite-shm", ".sqlite-wal"}
    }


def test_running_task_can_be_ahead_of_the_index(check, stored):
    running = stored.add_running_task("task-4")
    stored.index("task-4")
    running.record(Output.from_bytes("stdout", b"more\n"))
    # The writer has written only part of a record.
    with stored.records("task-4").open("ab") as records:
        records.write(b"0123")
    assert check() == []
    running.writer.close()
    assert check() == [("task-4", "journal_torn")]


def test_all_kinds_of_findings_are_reported_together(check, stored, run_cli):
    for number in range(4, 10):
        stored.add_completed_task(f"task-{number}")
    stored.index(*(f"task-{number}" for number in range(4, 9)))
    flip(stored.records("task-1"), 100)
    stored.records("task-2").unlink()
    os.truncate(stored.records("task-3"), stored.records("task-3").stat().st_size - 10)
    (stored.data_dir / "tasks" / "task-4" / "artifacts" / "notes.txt").unlink()
    (stored.data_dir / "tasks" / "task-5" / "artifacts" / "notes.txt").write_bytes(b"longer than it was\n")
    (stored.data_dir / "tasks" / "task-6" / "artifacts" / "notes.txt").write_bytes(b"KEPT\n")
    with stored.records("task-7").open("ab") as records:
        records.write(b"torn")
    store = stored.open_store()
    store.save(IndexedTask(store.load("task-7").task, store.load("task-8").offset))
    row = store.load("task-7")
    store.save(IndexedTask(row.task, stored.journals.find_offset("task-7", 5)))
    store.close()

    expected = [
        ("task-1", "journal_damaged"),
        ("task-2", "journal_missing"),
        ("task-3", "index_ahead"),
        ("task-3", "journal_torn"),
        ("task-4", "artifact_missing"),
        ("task-5", "artifact_damaged"),
        ("task-7", "index_differs"),
        ("task-7", "journal_torn"),
        ("task-9", "not_in_index"),
    ]
    assert check() == expected
    assert check("--deep") == sorted([*expected, ("task-6", "artifact_damaged")])
    plain = run_cli("admin", "check", "--data-dir", str(stored.data_dir))
    assert plain.returncode == 1
    assert len(plain.stdout.splitlines()) == len(expected)
    assert b"9 problems found" in plain.stderr


@pytest.mark.parametrize("is_finished", [True, False])
def test_suggested_rebuild_drops_a_task_without_a_journal(check, stored, run_cli, is_finished):
    if not is_finished:
        stored.add_running_task("task-9").writer.close()
        stored.index("task-9")
    task_id = "task-1" if is_finished else "task-9"
    stored.records(task_id).unlink()
    output = run_cli("admin", "check", "--data-dir", str(stored.data_dir)).stdout
    assert b"discard the task with: sandbox admin rebuild" in output
    assert check() == [(task_id, "journal_missing")]
    run_cli("admin", "rebuild", "--data-dir", str(stored.data_dir))
    assert check() == [(task_id, "journal_missing")], "the results are left"
    shutil.rmtree(TaskLayout(stored.data_dir, task_id).root)
    assert check() == []


@pytest.mark.parametrize(("column", "value"), [("task", b"{"), ("state", "asleep")])
def test_damaged_index_row_is_reported_and_fixed_by_rebuild(check, stored, run_cli, column, value):
    stored.damage_row("task-2", column, value)
    (stored.data_dir / "tasks" / "task-3" / "artifacts" / "notes.txt").unlink()
    assert check() == [("task-2", "index_differs"), ("task-3", "artifact_missing")]
    output = run_cli("admin", "check", "--data-dir", str(stored.data_dir)).stdout
    assert b"sandbox admin rebuild" in output.splitlines()[0]
    assert run_cli("admin", "rebuild", "--data-dir", str(stored.data_dir)).returncode == 0
    assert check() == [("task-3", "artifact_missing")]


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def test_missing_record_is_reported(check, stored, monkeypatch):
    lines = stored.records("task-1").read_bytes().splitlines(keepends=True)
    stored.records("task-1").write_bytes(b"".join(lines[:4] + lines[5:]))
    assert check() == [("task-1", "journal_damaged")]


def test_index_that_is_not_a_database_is_reported(check, stored):
    (stored.data_dir / "index.sqlite").write_bytes(b"this is no database, " * 100)
    assert check() == [("", "index_unusable")]


def test_missing_index_is_reported_unless_there_are_no_tasks(check, stored, run_cli, tmp_path):
    (stored.data_dir / "index.sqlite").unlink()
    assert check() == [("", "index_unusable")]
    (tmp_path / "empty").mkdir()
    assert run_cli("admin", "check", "--data-dir", str(tmp_path / "empty")).returncode == 0
    missing = run_cli("admin", "check", "--data-dir", str(tmp_path / "nowhere"))
    assert missing.returncode == 3
    assert b"--data-dir" in missing.stderr
    assert not (tmp_path / "nowhere").exists()


def test_task_ids_are_escaped(run_cli, stored):
    (stored.data_dir / "tasks" / "\x1b[31m").mkdir()
    assert b"\x1b" not in run_cli("admin", "check", "--data-dir", str(stored.data_dir)).stdout
