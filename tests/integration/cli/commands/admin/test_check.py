"""`sandbox admin check` finds what does not agree, tells all of it, and changes nothing."""

import hashlib
import json
import os

import pytest

from doubles.stored_tasks import KeptTasks
from sandbox.interfaces.store import IndexedTask
from sandbox.model.events import Output


@pytest.fixture
def kept(tmp_path):
    return KeptTasks.of_three(tmp_path / "data")


@pytest.fixture
def check(sandbox, kept):
    def run(*options):
        done = sandbox("admin", "check", "--data-dir", str(kept.data_dir), "--format", "json", *options)
        assert done.returncode in {0, 1}, done.stderr
        told = json.loads(done.stdout)
        assert told["clean"] == (done.returncode == 0) == (not told["findings"])
        return [(each["task_id"], each["kind"]) for each in told["findings"]]

    return run


def test_what_a_server_left_agrees(check, sandbox, kept):
    before = snapshot(kept.data_dir)
    assert check("--deep") == []
    plain = sandbox("admin", "check", "--data-dir", str(kept.data_dir))
    assert (plain.returncode, plain.stdout) == (0, b"")
    assert b"3 tasks" in plain.stderr
    assert snapshot(kept.data_dir) == before


def snapshot(directory):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix not in {".sqlite-shm", ".sqlite-wal"}
    }


def test_a_task_that_runs_may_be_ahead_of_the_index(check, kept):
    running = kept.run("task-4")
    kept.index("task-4")
    running.record(Output.from_bytes("stdout", b"more\n"))
    # The writer is in the middle of a record.
    with kept.records("task-4").open("ab") as records:
        records.write(b"0123")
    assert check() == []
    running.writer.close()
    assert check() == [("task-4", "journal_torn")]


def test_every_kind_of_disagreement_is_told_at_once(check, kept, sandbox):
    for number in range(4, 10):
        kept.finish(f"task-{number}")
    kept.index(*(f"task-{number}" for number in range(4, 9)))
    flip(kept.records("task-1"), 100)
    kept.records("task-2").unlink()
    os.truncate(kept.records("task-3"), kept.records("task-3").stat().st_size - 10)
    (kept.data_dir / "tasks" / "task-4" / "artifacts" / "notes.txt").unlink()
    (kept.data_dir / "tasks" / "task-5" / "artifacts" / "notes.txt").write_bytes(b"longer than it was\n")
    (kept.data_dir / "tasks" / "task-6" / "artifacts" / "notes.txt").write_bytes(b"KEPT\n")
    with kept.records("task-7").open("ab") as records:
        records.write(b"torn")
    store = kept.store()
    store.save(IndexedTask(store.load("task-7").task, store.load("task-8").offset))
    row = store.load("task-7")
    store.save(IndexedTask(row.task, kept.journals.find_offset("task-7", 5)))
    store.close()

    found = [
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
    assert check() == found
    assert check("--deep") == sorted([*found, ("task-6", "artifact_damaged")])
    plain = sandbox("admin", "check", "--data-dir", str(kept.data_dir))
    assert plain.returncode == 1
    assert len(plain.stdout.splitlines()) == len(found)
    assert b"9 things do not agree" in plain.stderr


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_task_without_a_journal_is_given_up_as_it_is_told(check, kept, sandbox, is_finished):
    if not is_finished:
        kept.run("task-9").writer.close()
        kept.index("task-9")
    task_id = "task-1" if is_finished else "task-9"
    kept.records(task_id).unlink()
    told = sandbox("admin", "check", "--data-dir", str(kept.data_dir)).stdout
    assert b"run: sandbox admin rebuild" in told
    assert check() == [(task_id, "journal_missing")]
    sandbox("admin", "rebuild", "--data-dir", str(kept.data_dir))
    assert check() == []


@pytest.mark.parametrize(("column", "value"), [("task", b"{"), ("state", "asleep")])
def test_a_damaged_row_of_the_index_is_told_and_mended_by_a_rebuild(check, kept, sandbox, column, value):
    kept.damage_row("task-2", column, value)
    (kept.data_dir / "tasks" / "task-3" / "artifacts" / "notes.txt").unlink()
    assert check() == [("task-2", "index_differs"), ("task-3", "artifact_missing")]
    told = sandbox("admin", "check", "--data-dir", str(kept.data_dir)).stdout
    assert b"sandbox admin rebuild" in told.splitlines()[0]
    assert sandbox("admin", "rebuild", "--data-dir", str(kept.data_dir)).returncode == 0
    assert check() == [("task-3", "artifact_missing")]


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def test_a_record_that_is_lost_between_two_batches_is_told(check, kept, monkeypatch):
    lines = kept.records("task-1").read_bytes().splitlines(keepends=True)
    kept.records("task-1").write_bytes(b"".join(lines[:4] + lines[5:]))
    assert check() == [("task-1", "journal_damaged")]


def test_an_index_that_is_no_database_is_told(check, kept):
    (kept.data_dir / "index.sqlite").write_bytes(b"this is no database, " * 100)
    assert check() == [("", "index_unusable")]


def test_without_an_index_there_must_be_no_tasks(check, kept, sandbox, tmp_path):
    (kept.data_dir / "index.sqlite").unlink()
    assert check() == [("", "index_unusable")]
    (tmp_path / "empty").mkdir()
    assert sandbox("admin", "check", "--data-dir", str(tmp_path / "empty")).returncode == 0
    nothing = sandbox("admin", "check", "--data-dir", str(tmp_path / "nowhere"))
    assert nothing.returncode == 3
    assert b"--data-dir" in nothing.stderr
    assert not (tmp_path / "nowhere").exists()


def test_ids_of_tasks_steer_no_terminal(sandbox, kept):
    (kept.data_dir / "tasks" / "\x1b[31m").mkdir()
    assert b"\x1b" not in sandbox("admin", "check", "--data-dir", str(kept.data_dir)).stdout
