"""The store in one SQLite file."""

import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from sandbox.interfaces.store import DuplicateTaskError, IndexDamagedError, Indexed, TaskPage, TaskQuery, as_listed
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Artifact
from sandbox.model.task import FOLD, Task
from sandbox.model.task_state import TaskState
from sandbox.store.connections import Connections, is_disk_full
from sandbox.store.listing import ListedRow, Listing, cursor_of, microseconds
from sandbox.store.schema import StoreUnusableError, migrate, refuse_other

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries() -> dict[str, str]:
    """Every query of `queries.sql`, without its comments and the semicolon at its end."""
    _, *parts = _NAME.split((files(__package__) / "queries.sql").read_text(encoding="utf-8"))
    return {name: _without_comments(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip().removesuffix(";")


T = TypeVar("T")
_log = logging.getLogger(__name__)
_UNFINISHED = msgspec.json.encode([state for state in TaskState if not state.is_terminal]).decode()
_decoder = msgspec.json.Decoder(Task)
_artifacts_decoder = msgspec.json.Decoder(tuple[Artifact, ...])


class SqliteStore:
    """The contract's `Store`, for any thread. What it returned from is on disk."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or make the file, bringing an older one up to date. Raises StoreTooNewError, StoreUnusableError.

        read_only: take it as it is and change nothing; no method that writes may be called.
        """
        self._sql = load_queries()
        self._noted: set[tuple[str, str]] = set()
        try:
            self._connections = _open(path, read_only=read_only)
        except (sqlite3.Error, OSError) as error:
            raise StoreUnusableError(f"The index {path} cannot be used ({error}); {_advice(error, path)}.") from error

    def insert(self, indexed: Indexed) -> None:
        """Add a new task. Raises DuplicateTaskError."""
        row = _row(indexed)
        with self._connections.writing() as connection:
            if connection.execute(self._sql["insert_task"], row).rowcount == 0:
                [known] = connection.execute(self._sql["load_task"], row).fetchall()
                raise DuplicateTaskError(_indexed(known).task)
            self._write_beside(connection, indexed.task)

    def save(self, indexed: Indexed) -> None:
        """Replace what is known of a task, or add it."""
        self.save_all([indexed])

    def save_all(self, indexed: Sequence[Indexed]) -> None:
        """`save` for many, all of them or none."""
        with self._connections.writing() as connection:
            for each in indexed:
                connection.execute(self._sql["save_task"], _row(each))
                self._write_beside(connection, each.task)

    def forget(self, task_id: str) -> None:
        """Take a task out of the index, and with it what stands beside it."""
        with self._connections.writing() as connection:
            connection.execute(self._sql["forget_task"], {"id": task_id})

    def outdated(self) -> Sequence[str]:
        """The tasks that a program with other rules worked out of their journals (see `FOLD`), and damaged ones."""
        with self._connections.reading() as connection:
            rows = connection.execute(self._sql["every_task"])
            return [row[0] for fold, changed_at, *row in rows if fold != FOLD or not _is_readable(row, changed_at)]

    def load(self, task_id: str) -> Indexed | None:
        """What is known of a task, None for an unknown one."""
        rows = self._read("load_task", {"id": task_id})
        return _indexed(rows[0]) if rows else None

    def unfinished(self) -> Sequence[Indexed]:
        """All tasks in a state that is not terminal, oldest first; without those whose row is damaged."""
        found: list[Indexed] = []
        for row in self._read("unfinished_tasks", {"states": _UNFINISHED}):
            try:
                found.append(_indexed(row))
            except IndexDamagedError as error:
                self._note(row[0], error)
        return found

    def find_by_idempotency_key(self, key: str, since: datetime) -> Indexed | None:
        """The newest task that was submitted with this key, not before `since`."""
        rows = self._read("find_by_idempotency_key", {"key": key, "since": microseconds(since)})
        return _indexed(rows[0]) if rows else None

    def query(self, query: TaskQuery) -> TaskPage:
        """A page of tasks, `as_listed`. Raises InvalidCursorError."""
        listing = Listing(self._sql, query)
        with self._connections.reading() as connection:
            found, total = listing.read(connection)
        rows, tasks, damaged = found[: query.limit], [], {}
        for row in rows:
            try:
                tasks.append(_listed(row, query))
            except IndexDamagedError as error:
                self._note(row.id, error)
                damaged[row.id] = error.message
        has_more = bool(rows) and len(found) > query.limit
        return TaskPage(tasks, total, cursor_of((rows[-1].value, rows[-1].id)) if has_more else None, damaged)

    def count_by_state(self) -> Mapping[TaskState, int]:
        """How many tasks are in each state; every state is a key. Rows with a damaged state are not counted."""
        counts = dict.fromkeys(TaskState, 0)
        for state, count in self._read("count_by_state"):
            try:
                counts[TaskState(state)] = count
            except ValueError as error:
                self._note("", IndexDamagedError(error))
        return counts

    def task_ids(self) -> frozenset[str]:
        """Every task in the index."""
        return frozenset(task_id for (task_id,) in self._read("task_ids"))

    def close(self) -> None:
        """Let go of the files."""
        self._connections.close()

    def _note(self, task_id: str, error: IndexDamagedError) -> None:
        """Log a damaged row once."""
        if (told := (task_id, error.message)) not in self._noted:
            self._noted.add(told)
            _log.error("Task %s is left out: %s", task_id or "?", error.message, extra={"task_id": task_id or None})

    def _read(self, name: str, values: Mapping[str, object] | None = None) -> list[Any]:
        with self._connections.reading() as connection:
            return connection.execute(self._sql[name], values or {}).fetchall()

    def _write_beside(self, connection: sqlite3.Connection, task: Task) -> None:
        """Most saves find texts and labels as they are, and then write nothing."""
        connection.execute(self._sql["keep_texts"], _texts(task))
        labels = task.manifest.metadata.labels
        if dict(connection.execute(self._sql["labels"], {"id": task.id})) == labels:
            return
        connection.execute(self._sql["drop_labels"], {"id": task.id})
        connection.executemany(self._sql["add_label"], [(task.id, key, value) for key, value in labels.items()])


def _advice(error: sqlite3.Error | OSError, path: Path) -> str:
    if is_disk_full(error, path):
        return "its disk is full: make room and try again"
    return "if it is damaged, move it away to have it rebuilt from the journals"


def _open(path: Path, *, read_only: bool) -> Connections:
    connections = Connections(path, read_only=read_only)
    try:
        if read_only:
            refuse_other(connections.writer)
        else:
            migrate(connections.writer, path)
    except BaseException:
        connections.close()
        raise
    return connections


def _row(indexed: Indexed) -> dict[str, object]:
    task = indexed.task
    return {
        "id": task.id,
        "name": task.manifest.metadata.name,
        "state": task.state.value,
        "created_at": microseconds(task.created_at),
        "started_at": microseconds(task.started_at) if task.started_at else None,
        "state_changed_at": microseconds(task.state_changed_at),
        "idempotency_key": task.idempotency.key if task.idempotency else None,
        "journal_offset": indexed.offset,
        "task": msgspec.json.encode(as_listed(task)),
        "fold": FOLD,
        "artifacts": msgspec.json.encode(task.artifacts),
    }


def _texts(task: Task) -> dict[str, object]:
    prompt, patch = task.manifest.claude.prompt, task.manifest.repository.patch
    return {"id": task.id, "prompt": prompt.encode(), "patch": None if patch is None else patch.encode()}


def _listed(row: ListedRow, query: TaskQuery) -> Task:
    """Rows of before have their texts in them. What the age of tasks is asked for relies on the order of the rows."""
    task = _task(row.id, row.encoded)
    if query.sort == "state_changed_at":
        _check_time(task, row.value)
    return as_listed(task) if task.manifest.claude.prompt else task


class _Parts(NamedTuple):
    """What a row has, each of it readable."""

    task: Task
    artifacts: tuple[Artifact, ...]
    prompt: str
    patch: str | None


def _parts(row: Sequence[Any]) -> _Parts:
    task_id, encoded, _, state, artifacts, prompt, patch = row
    task = _task(task_id, encoded)
    if task.state != state:
        raise IndexDamagedError(f"task {task.id} is {task.state}, and {state!r} by its row")
    kept = task.manifest.claude.prompt, task.manifest.repository.patch
    texts = kept if kept[0] else (_text(prompt), None if patch is None else _text(patch))
    if not texts[0]:
        raise IndexDamagedError(f"task {task.id} has no prompt")
    return _Parts(task, _decoded(_artifacts_decoder, artifacts), *texts)


def _task(task_id: str, encoded: bytes) -> Task:
    task = _decoded(_decoder, encoded)
    if task.id != task_id:
        raise IndexDamagedError(f"the row of task {task_id} tells of task {task.id}")
    return task


def _check_time(task: Task, changed_at: object) -> None:
    if microseconds(task.state_changed_at) != changed_at:
        raise IndexDamagedError(f"task {task.id} changed at {task.state_changed_at}, and at {changed_at!r} by its row")


def _text(data: bytes | None) -> str:
    try:
        return (data or b"").decode()
    except ValueError as error:
        raise IndexDamagedError(error) from error


def _indexed(row: Sequence[Any]) -> Indexed:
    task, artifacts, prompt, patch = _parts(row)
    manifest, offset = task.manifest, row[2]
    claude, repository = replace(manifest.claude, prompt=prompt), replace(manifest.repository, patch=patch)
    manifest = replace(manifest, claude=claude, repository=repository)
    return Indexed(msgspec.structs.replace(task, artifacts=artifacts, manifest=manifest), offset)


def _decoded(decoder: msgspec.json.Decoder[T], encoded: bytes) -> T:
    try:
        return decoder.decode(encoded)
    except (*DECODE_ERRORS, ValueError) as error:
        raise IndexDamagedError(error) from error


def _is_readable(row: Sequence[Any], changed_at: int) -> bool:
    try:
        _check_time(_parts(row).task, changed_at)
    except IndexDamagedError:
        return False
    return True
