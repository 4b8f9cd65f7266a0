"""What only a store with a file can promise: it survives its process, and it knows its own age."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime

import msgspec
import pytest

from sandbox.interfaces.store import IndexDamagedError, IndexedTask, StoreError, TaskQuery, without_large_fields
from sandbox.model import events as e
from sandbox.model.events import Artifact
from sandbox.model.manifest.schema import Claude, Manifest, Metadata, Repository
from sandbox.model.state_machine import advance
from sandbox.model.task import PROJECTION_VERSION
from sandbox.model.task_state import TaskState
from sandbox.store.listing import to_microseconds
from sandbox.store.schema import StoreTooNewError, StoreUnusableError
from sandbox.store.sqlite import SqliteStore

INSERT_FOR_EVER = """
import sys
from pathlib import Path

import msgspec
from sandbox.interfaces.store import IndexedTask
from sandbox.model.task import Task
from sandbox.store.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
task = msgspec.json.decode(sys.argv[2], type=Task)
for number in range(100_000):
    store.insert(IndexedTask(msgspec.structs.replace(task, id=f"task-{number}"), number))
    print(number, flush=True)
"""

TO_VERSION_3 = """
DROP TABLE texts;
ALTER TABLE tasks DROP COLUMN artifacts;
ALTER TABLE tasks DROP COLUMN fold;
PRAGMA user_version = 3;
"""


def submitted(task_id, prompt="p"):
    manifest = Manifest(
        version="1",
        kind="Task",
        metadata=Metadata(name="n", labels={"k": "v"}),
        repository=Repository(url="https://git.example.org/r", branch="main"),
        claude=Claude(prompt=prompt),
    )
    return advance(None, e.TaskSubmitted(task_id, manifest), seq=1, at=datetime.now(UTC)).task


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index.sqlite"


def version(path):
    connection = sqlite3.connect(path)
    [number] = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return number


def test_what_was_inserted_is_there_after_a_restart(path):
    store = SqliteStore(path)
    store.insert(IndexedTask(submitted("a"), 5))
    known = store.load("a")
    store.close()

    store = SqliteStore(path)
    assert store.load("a") == known
    store.close()


def test_what_was_answered_survives_the_kill_of_its_process(path):
    task = msgspec.json.encode(submitted("a")).decode()
    command = [sys.executable, "-c", INSERT_FOR_EVER, str(path), task]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        said = [int(server.stdout.readline()) for _ in range(20)]
        os.kill(server.pid, signal.SIGKILL)
        said += [int(word) for word in server.stdout.read().split()]

    store = SqliteStore(path)
    known = store.task_ids()
    assert {f"task-{number}" for number in said} <= known
    assert store.query(TaskQuery(labels={"k": "v"}, limit=1)).total_count == len(known)
    assert len(known) - len(said) in (0, 1)
    store.close()


def test_every_commit_waits_for_the_disk(path):
    store = SqliteStore(path)
    with store._connections.write_transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with pytest.raises(StoreError, match="readonly"), store._connections.read_transaction() as connection:
        connection.execute("DELETE FROM tasks")
    store.close()


def test_a_change_that_fails_half_way_changes_nothing(path):
    store = SqliteStore(path)
    store.insert(IndexedTask(submitted("a"), 1))
    known = store.load("a")
    store._sql["add_label"] = "INSERT INTO nowhere VALUES (?, ?, ?)"
    store._sql["labels"] = "SELECT 'k', 'other' WHERE :id = :id"
    with pytest.raises(StoreError, match="nowhere"):
        store.save(IndexedTask(submitted("a"), 2))
    with pytest.raises(StoreError, match="nowhere"):
        store.insert(IndexedTask(submitted("b"), 2))

    assert store.load("a") == known
    assert store.task_ids() == {"a"}
    assert store.query(TaskQuery(labels={"k": "v"})).total_count == 1
    store.close()


def test_who_only_reads_an_older_index_is_told_who_brings_it_up_to_date(path):
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    connection.executescript(TO_VERSION_3)
    connection.close()

    with pytest.raises(StoreUnusableError, match=r"version 3.*start the server"):
        SqliteStore(path, read_only=True)

    assert version(path) == 3
    SqliteStore(path).close()
    SqliteStore(path, read_only=True).close()


def test_a_database_of_a_newer_program_is_left_alone(path):
    SqliteStore(path).close()
    newer = version(path) + 1
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {newer}")
    connection.close()

    with pytest.raises(StoreTooNewError, match="rebuilt from the journals") as refused:
        SqliteStore(path)

    assert refused.value.code == "store_too_new"
    assert version(path) == newer


def test_a_step_that_fails_leaves_the_database_as_it_was(path, monkeypatch):
    SqliteStore(path).close()
    before = version(path)
    from sandbox.store import schema

    steps = {**schema._load_migrations(), before + 1: "CREATE TABLE half (x);\nINSERT INTO nowhere VALUES (1);"}
    monkeypatch.setattr(schema, "_load_migrations", lambda: steps)

    with pytest.raises(StoreUnusableError, match="nowhere"):
        SqliteStore(path)

    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchone() is None
    connection.close()
    assert version(path) == before


def test_a_step_that_is_new_is_taken_once(path, monkeypatch):
    store = SqliteStore(path)
    store.insert(IndexedTask(submitted("a"), 1))
    store.close()
    from sandbox.store import schema

    steps = {**schema._load_migrations(), version(path) + 1: "CREATE TABLE later (x INTEGER) STRICT;"}
    monkeypatch.setattr(schema, "_load_migrations", lambda: steps)
    for _ in range(2):
        store = SqliteStore(path)
        assert store.task_ids() == {"a"}
        store.close()
    assert version(path) == max(steps)


def test_pages_are_read_in_the_order_of_an_index(path):
    store = SqliteStore(path)
    with store._connections.read_transaction() as connection:
        for sort in ("created_at", "started_at", "state_changed_at", "name"):
            for order in ("asc", "desc"):
                page = store._sql["task_page"].format(filters="true", sort=sort, order=order)
                plan = connection.execute(f"EXPLAIN QUERY PLAN {page}", {"limit": 1, "offset": 0}).fetchall()
                assert not any("TEMP B-TREE" in step for *_, step in plan), (sort, order, plan)
    store.close()


def test_an_index_of_the_first_version_is_brought_up_to_date(path, monkeypatch):
    from sandbox.store import schema

    steps = schema._load_migrations()
    connection = sqlite3.connect(path)
    connection.executescript(f"{steps[1]}\nPRAGMA user_version = 1;")
    task = submitted("old")
    connection.execute(
        "INSERT INTO tasks VALUES ('old', 'n', 'pending', 1, NULL, 1, 7, ?)", (msgspec.json.encode(task),)
    )
    connection.execute("INSERT INTO labels VALUES ('old', 'k', 'v')")
    connection.commit()
    connection.close()

    store = SqliteStore(path)
    assert store.load("old") == IndexedTask(task, 7)
    assert store.query(TaskQuery(labels={"k": "v"})).tasks == [without_large_fields(task)]
    assert store.find_by_idempotency_key("old", datetime(1970, 1, 1, tzinfo=UTC)) is None
    store.close()


@pytest.mark.parametrize("damage", [b"{", b"\xff", b"[]", b"[" * 100_000, b'{"artifacts": 3}'])
def test_artifacts_of_an_older_index_are_moved_out_of_its_tasks(path, damage):
    from sandbox.store import schema

    artifacts = tuple(Artifact(f"{n}.md", f"é\u2028\x00\\{n}", 2**40, "text/plain", "sha256:00") for n in range(3))
    task = msgspec.structs.replace(submitted("old"), artifacts=artifacts, result={"n": [1, 2.5, None, "\x00"]})
    connection = sqlite3.connect(path)
    for number, step in sorted(schema._load_migrations().items()):
        if number <= 5:
            connection.executescript(f"{step}\nPRAGMA user_version = {number};")
    changed_at = to_microseconds(task.state_changed_at)
    insert = f"INSERT INTO tasks VALUES (?, 'n', 'pending', 1, NULL, {changed_at}, 7, ?, NULL, ?)"
    for task_id, content in (("old", msgspec.json.encode(task)), ("damaged", damage)):
        connection.execute(insert, (task_id, content, PROJECTION_VERSION))
    connection.commit()
    connection.close()

    store = SqliteStore(path)
    assert store.outdated_task_ids() == ["damaged"]
    assert store.load("old") == IndexedTask(task, 7)
    store.delete("damaged")
    assert store.query(TaskQuery()).tasks == [without_large_fields(task)]
    store.close()


def test_a_large_prompt_is_written_once_however_often_its_task_changes(path):
    store = SqliteStore(path)
    known = submitted("a", prompt="x" * 500_000)
    store.insert(IndexedTask(known, 1))
    written_bytes = path.with_name("index.sqlite-wal").stat().st_size
    for number in range(10):
        progress = e.Progress(output_bytes=number)
        store.save(IndexedTask(msgspec.structs.replace(known, progress=progress), 2 + number))
    assert path.with_name("index.sqlite-wal").stat().st_size < written_bytes + 500_000
    assert store.load("a").task.manifest == known.manifest
    store.close()


def test_the_texts_of_an_older_index_are_read_where_they_were(path):
    store = SqliteStore(path)
    known = IndexedTask(submitted("a"), 1)
    store.save(known)
    rot(path, "task", msgspec.json.encode(known.task))
    change(path, "DELETE FROM texts")
    assert (store.outdated_task_ids(), store.load("a")) == ([], known)
    assert store.query(TaskQuery()).tasks == [without_large_fields(known.task)]
    store.save(known)
    assert (store.outdated_task_ids(), store.load("a")) == ([], known)
    store.close()


def test_a_task_whose_texts_are_gone_is_read_anew(path):
    store = SqliteStore(path)
    known = IndexedTask(submitted("a"), 1)
    store.save(known)
    change(path, "DELETE FROM texts")
    with pytest.raises(IndexDamagedError, match="no prompt"):
        store.load("a")
    assert store.outdated_task_ids() == ["a"]
    store.save(known)
    assert (store.outdated_task_ids(), store.load("a")) == ([], known)
    store.close()


def test_who_uses_an_id_again_has_texts_of_their_own(path):
    store = SqliteStore(path)
    store.save(IndexedTask(submitted("a", prompt="first"), 1))
    store.delete("a")
    known = IndexedTask(submitted("a", prompt="second"), 1)
    store.insert(known)
    assert store.load("a") == known
    store.close()


def test_a_list_reads_no_artifacts(path):
    store = SqliteStore(path)
    store.save(IndexedTask(submitted("a"), 1))
    rot(path, "artifacts", b"what nobody reads")
    assert [task.id for task in store.query(TaskQuery()).tasks] == ["a"]
    store.close()


def test_a_key_is_found_by_its_index(path):
    store = SqliteStore(path)
    with store._connections.read_transaction() as connection:
        question = f"EXPLAIN QUERY PLAN {store._sql['find_by_idempotency_key']}"
        plan = connection.execute(question, {"key": "k", "since": 0}).fetchall()
    assert [step for *_, step in plan if "tasks_by_idempotency_key" in step and "SEARCH" in step]
    assert not any("TEMP B-TREE" in step for *_, step in plan)
    store.close()


def test_after_closing_nothing_is_open_and_nothing_is_answered(path):
    store = SqliteStore(path)
    barrier = threading.Barrier(8)

    def read():
        barrier.wait(10)
        store.task_ids()

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    store.close()
    store.close()

    with pytest.raises(StoreError):
        store.task_ids()
    with pytest.raises(StoreError):
        store.insert(IndexedTask(submitted("a"), 1))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_no_index_is_refused_with_a_sentence_and_left_alone(tmp_path):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(StoreUnusableError, match="move it away"):
        SqliteStore(path)
    assert path.read_bytes() == b"garbage" * 100


def test_before_an_older_index_is_brought_up_to_date_it_is_copied(path):
    store = SqliteStore(path)
    known = submitted("a")
    store.insert(IndexedTask(known, 5))
    store.close()
    newest = version(path)
    rot(path, "task", msgspec.json.encode(known))
    connection = sqlite3.connect(path)
    connection.executescript(TO_VERSION_3)
    connection.close()
    path.with_name("index.sqlite.v3.new").write_bytes(b"what a crash left")

    store = SqliteStore(path)
    assert version(path) == newest
    assert store.outdated_task_ids() == ["a"]
    store.save(store.load("a"))
    assert store.outdated_task_ids() == []
    store.close()
    assert version(path.with_name("index.sqlite.v3")) == 3
    assert sorted(each.name for each in path.parent.iterdir()) == ["index.sqlite", "index.sqlite.v3"]


def change(path, statement, *values):
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def rot(path, column, value):
    table, key = ("texts", "task_id") if column in {"prompt", "patch"} else ("tasks", "id")
    change(path, f"UPDATE {table} SET {column} = ? WHERE {key} = 'a'", value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("task", b"{"),
        ("task", b"\xff"),
        ("task", b"[" * 100_000),
        ("task", b"{}"),
        ("state", "asleep"),
        ("artifacts", b"["),
        ("prompt", b""),
        ("prompt", b"\xff"),
        ("patch", b"\xff"),
    ],
)
def test_a_row_that_is_damaged_is_told_with_what_to_do_and_read_anew(path, caplog, column, value):
    store = SqliteStore(path)
    known = IndexedTask(submitted("a"), 5)
    for each in (known, IndexedTask(submitted("b"), 5)):
        store.insert(each)
    rot(path, column, value)

    for ask in (lambda: store.load("a"), lambda: store.insert(known)):
        with pytest.raises(IndexDamagedError, match="sandbox admin rebuild"):
            ask()
    for _ in range(3):
        assert [each.task.id for each in store.unfinished()] == ["b"]
        assert store.count_by_state()[TaskState.PENDING] == (1 if column == "state" else 2)
        page = store.query(TaskQuery())
        in_list = column != "task"  # which shows neither artifacts nor texts
        assert {task.id for task in page.tasks} == ({"a", "b"} if in_list else {"b"})
        assert [*page.damaged] == ([] if in_list else ["a"])
        assert all("sandbox admin rebuild" in reason for reason in page.damaged.values())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "sandbox admin rebuild" in told[0]
    assert store.load("b").task.id == "b"
    assert store.outdated_task_ids() == ["a"]
    store.save(known)
    assert store.outdated_task_ids() == []
    assert store.load("a") == known
    store.close()


def test_a_row_that_tells_of_another_task_is_read_anew(path):
    store = SqliteStore(path)
    for task_id in "ab":
        store.insert(IndexedTask(submitted(task_id), 5))
    rot(path, "task", msgspec.json.encode(store.load("b").task))
    assert store.outdated_task_ids() == ["a"]
    with pytest.raises(IndexDamagedError, match="tells of task b"):
        store.load("a")
    assert [each.task.id for each in store.unfinished()] == ["b"]
    assert [task.id for task in store.query(TaskQuery()).tasks] == ["b"]
    store.close()


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_row_with_another_time_than_its_task_is_in_no_list_by_that_time_and_read_anew(path, order):
    """Else who asks for the oldest ones would stop at it."""
    store = SqliteStore(path)
    known = IndexedTask(submitted("a"), 5)
    for each in (known, IndexedTask(submitted("b"), 5)):
        store.insert(each)
    rot(path, "state_changed_at", 0)
    page = store.query(TaskQuery(sort="state_changed_at", order=order))
    assert ([task.id for task in page.tasks], [*page.damaged]) == (["b"], ["a"])
    assert {task.id for task in store.query(TaskQuery()).tasks} == {"a", "b"}
    assert store.outdated_task_ids() == ["a"]
    store.save(known)
    assert store.outdated_task_ids() == []
    assert {task.id for task in store.query(TaskQuery(sort="state_changed_at")).tasks} == {"a", "b"}
    store.close()


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("sort", ["created_at", "started_at", "state_changed_at", "name"])
@pytest.mark.parametrize("where", ["first", "middle", "last", "all"])
def test_pages_go_on_behind_damaged_rows_wherever_they_are(path, sort, order, where):
    store = SqliteStore(path)
    names = [f"task-{number}" for number in range(7)]
    for name in names:
        store.insert(IndexedTask(submitted(name), 5))
    hurt = {"first": names[:3], "middle": names[2:5], "last": names[-3:], "all": names}[where]
    for name in hurt:
        change(path, "UPDATE tasks SET task = ? WHERE id = ?", b"{", name)
    seen, damaged, query = [], [], TaskQuery(sort=sort, order=order, limit=2)
    while True:
        page = store.query(query)
        assert page.total_count == len(names)
        seen += [task.id for task in page.tasks]
        damaged += page.damaged
        if page.next_cursor is None:
            break
        query = dataclasses.replace(query, cursor=page.next_cursor)
    assert sorted(seen) == [name for name in names if name not in hurt]
    assert sorted(damaged) == hurt
    store.close()


def test_a_new_index_has_nothing_to_copy(path):
    SqliteStore(path).close()
    SqliteStore(path).close()
    assert [each.name for each in path.parent.iterdir()] == ["index.sqlite"]


def test_without_room_for_the_copy_the_index_stays_as_it_was(path):
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    connection.executescript(TO_VERSION_3)
    connection.close()
    path.with_name("index.sqlite.v3.new").mkdir()

    with pytest.raises(StoreUnusableError):
        SqliteStore(path)
    assert version(path) == 3
