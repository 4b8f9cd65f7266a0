"""Implements the store with one SQLite file."""

import contextlib
import logging
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from sandbox.interfaces.store import (
    ChangedTask,
    ChangePosition,
    Cursor,
    IndexDamagedError,
    IndexedTask,
    InvalidCursorError,
    TaskPage,
    TaskQuery,
)
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.manifest.schema import decode_manifest, encode_manifest
from sandbox.model.task import INDEXED_TASK_VERSION, Task
from sandbox.model.task_state import TaskState
from sandbox.store.database import (
    SQLITE_ERRORS,
    Connections,
    StoreUnusableError,
    is_disk_full,
    migrate,
    require_current_version,
)
from sandbox.store.listing import (
    ListedRow,
    PageReader,
    content_digest,
    cursor_position,
    decode_task_item,
    state_term,
    task_terms,
    to_cursor,
    to_microseconds,
    to_nanodollars,
    without_patch,
)

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries() -> dict[str, str]:
    """Return the queries in `queries.sql`, keyed by name, without comments and final semicolons."""
    _, *parts = _NAME.split((files(__package__) / "queries.sql").read_text(encoding="utf-8"))
    return {name: _without_comments(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip().removesuffix(";")


_SEARCHABLE_BATCH_SIZE = 1000
_DECODE_ERRORS = (*DECODE_ERRORS, ValueError, TypeError)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_UNFINISHED_STATES = msgspec.json.encode([state for state in TaskState if not state.is_final]).decode()
_encoder = msgspec.json.Encoder(enc_hook=encode_manifest)
_decoder = msgspec.json.Decoder(Task, dec_hook=decode_manifest)
_artifacts_decoder = msgspec.json.Decoder(tuple[Artifact, ...])


def without_large_fields(task: Task) -> Task:
    """Return the task without the large fields that no list shows: artifacts, prompt and patch."""
    agent, repository = task.manifest.agent.with_prompt(""), without_patch(task.manifest.repository)
    manifest = task.manifest.replace(agent=agent, repository=repository)
    return msgspec.structs.replace(task, artifacts=(), manifest=manifest)


class SqliteStore:
    """Implements `Store`. Thread-safe. Changes are on disk when a method returns."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the file and migrate an older one. Raises StoreTooNewError, StoreUnusableError.

        read_only: open the file unchanged; writing methods must not be called.
        """
        self._sql = load_queries()
        self._logged_errors: set[tuple[str, str]] = set()
        try:
            self._connections = _open(path, read_only=read_only)
            if not read_only:
                self._make_searchable()
        except (*SQLITE_ERRORS, OSError) as error:
            raise StoreUnusableError(f"The index {path} cannot be used ({error}); {_advice(error, path)}.") from error

    def save(self, indexed: IndexedTask) -> None:
        """Replace or add a task."""
        self.save_all([indexed])

    def save_all(self, indexed: Sequence[IndexedTask]) -> None:
        """Replace or add tasks, in one transaction."""
        with self._connections.write_transaction() as connection:
            for each in indexed:
                self._save(connection, each)

    def delete(self, task_id: str) -> None:
        """Remove a task from the index, including its texts and terms.

        The terms of a damaged row are unknown, so they remain. A search returns no task for them, but searches
        without a filter count them as tasks.
        """
        with self._connections.write_transaction() as connection:
            self._delete_searchable(connection, task_id)
            connection.execute(self._sql["delete_task"], {"id": task_id})

    def outdated_task_ids(self) -> Sequence[str]:
        """Return the tasks indexed with a different INDEXED_TASK_VERSION, and those whose row is damaged."""
        with self._connections.read_transaction() as connection:
            rows = connection.execute(self._sql["all_tasks"])
            return [
                row[0]
                for fold, changed_at, *row in rows
                if isinstance(row[0], str) and (fold != INDEXED_TASK_VERSION or not _is_readable(row, changed_at))
            ]

    def load(self, task_id: str) -> IndexedTask | None:
        """Return a task, or None if it is unknown."""
        rows = self._fetch_all("load_task", {"id": task_id})
        return _to_indexed(rows[0]) if rows else None

    def load_without_large_fields(self, task_id: str) -> IndexedTask | None:
        """Return a task without its prompt, patch, artifacts and the agent's report, or None if it is unknown."""
        rows = self._fetch_all("load_task_state", {"id": task_id})
        return _to_indexed_state(rows[0]) if rows else None

    def unfinished(self) -> Sequence[IndexedTask]:
        """Return all tasks in a state that is not final, oldest first. Tasks whose row is damaged are omitted."""
        found: list[IndexedTask] = []
        for row in self._fetch_all("unfinished_tasks", {"states": _UNFINISHED_STATES}):
            try:
                found.append(_to_indexed(row))
            except IndexDamagedError as error:
                self._log_once(row[0], error)
        return found

    def find_by_idempotency_key(self, key: str, since: datetime) -> IndexedTask | None:
        """Return the newest task submitted with this key at or after `since`."""
        rows = self._fetch_all("find_by_idempotency_key", {"key": key, "since": to_microseconds(since)})
        return _to_indexed(rows[0]) if rows else None

    def query(self, query: TaskQuery) -> TaskPage:
        """Return a page of tasks (`decode_task_item`). Raises InvalidCursorError."""
        listing = PageReader(self._sql, query)
        with self._connections.read_transaction() as connection:
            found, totals = listing.read(connection, partial(_decode_listed, query.sort))
        rows, tasks, damaged = found[: query.limit], [], {}
        for row in rows:
            if isinstance(row.task, IndexDamagedError):
                self._log_once(row.id, row.task)
                damaged[row.id] = row.task
            else:
                tasks.append(row.task)
        has_more = bool(rows) and len(found) > query.limit
        cursor = _cursor_after(rows[-1], query) if has_more else None
        return TaskPage(tasks, totals.tasks, cursor, damaged, totals if query.with_totals else None)

    def last_change_position(self) -> ChangePosition:
        """Return the position after the latest state change."""
        return ChangePosition(*self._fetch_all("last_change_position")[0])

    def changed_tasks(self, after: ChangePosition, limit: int) -> Sequence[ChangedTask]:
        """Return the tasks whose state changed after a position, each with the position after its latest change."""
        last = self.last_change_position()
        is_known = after.index_id == last.index_id and after.number <= last.number
        position = after.number if is_known else 0
        changed: list[ChangedTask] = []
        while not changed:
            with self._connections.read_transaction() as connection:
                values = {"after": position, "limit": limit}
                rows = [
                    (number, task_id, _decode_item(task_id, encoded))
                    for number, task_id, encoded in connection.execute(self._sql["changed_tasks"], values)
                ]
            for number, task_id, item in rows:
                position = number
                if isinstance(item, IndexDamagedError):
                    self._log_once(task_id, item)
                else:
                    changed.append(ChangedTask(ChangePosition(last.index_id, number), item))
            if not rows:
                break
        return changed

    def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        """Return the beginning of each task's prompt, keyed by task id."""
        values = {"ids": msgspec.json.encode(list(task_ids)).decode(), "bytes": length}
        rows = self._fetch_all("prompt_beginnings", values) if task_ids else []
        return {task_id: beginning.decode(errors="ignore") for task_id, beginning in rows}

    def count_by_state(self) -> Mapping[TaskState, int]:
        """Count the tasks by state; every state is a key. Rows with a damaged state are not counted."""
        counts = dict.fromkeys(TaskState, 0)
        for state, count in self._fetch_all("count_by_state"):
            try:
                counts[TaskState(state)] = count
            except ValueError as error:
                self._log_once("", IndexDamagedError(error))
        return counts

    def task_ids(self) -> frozenset[str]:
        """Return the ids of all indexed tasks."""
        return frozenset(task_id for (task_id,) in self._fetch_all("task_ids") if isinstance(task_id, str))

    def close(self) -> None:
        """Close all connections to the database."""
        self._connections.close()

    def _log_once(self, task_id: str, error: IndexDamagedError) -> None:
        if (logged_error := (task_id, error.message)) not in self._logged_errors:
            self._logged_errors.add(logged_error)
            _log.error("Task %s is skipped: %s", task_id or "?", error.message, extra={"task_id": task_id or None})

    def _fetch_all(self, name: str, values: Mapping[str, object] | None = None) -> list[Any]:
        with self._connections.read_transaction() as connection:
            return connection.execute(self._sql[name], values or {}).fetchall()

    def _save(self, connection: sqlite3.Connection, indexed: IndexedTask) -> None:
        """Write a task. Its texts and its searchable content are written only if they changed, which happens rarely."""
        task, row = indexed.task, _row(indexed)
        known = connection.execute(self._sql["searchable"], row).fetchone()
        if known is None or known[1] != row["content"]:
            self._delete_searchable(connection, task.id)
            number = self._add_searchable(connection, task)
        else:
            number = known[0]
            self._update_searchable(connection, number, known[2:], row)
        change = 0
        if known is None or known[2] != row["state"]:
            [[change]] = connection.execute(self._sql["count_change"]).fetchall()
        connection.execute(self._sql["save_task"], {**row, "number": number, "change": change})
        connection.execute(self._sql["save_texts"], _texts(task))

    def _add_searchable(self, connection: sqlite3.Connection, task: Task) -> int:
        """Add the searchable content of a task; return the task's number."""
        number = connection.execute(self._sql["add_searchable"], _searchable(task)).lastrowid
        assert number is not None
        terms = f"{task_terms(task)} {state_term(task.state)}"
        connection.execute(self._sql["add_terms"], {"number": number, "terms": terms})
        return number

    def _update_searchable(
        self, connection: sqlite3.Connection, number: int, known: tuple[object, ...], row: Mapping[str, object]
    ) -> None:
        """Write what can change while a task exists. known: the stored values of the columns that can change."""
        if known == (row["state"], row["started_at"], row["state_changed_at"], row["cost"]):
            return
        connection.execute(self._sql["update_searchable"], row)
        if known[0] != row["state"]:
            for name, state in (("delete_terms", known[0]), ("add_terms", row["state"])):
                connection.execute(self._sql[name], {"number": number, "terms": state_term(str(state))})

    def _delete_searchable(self, connection: sqlite3.Connection, task_id: str) -> None:
        for row in connection.execute(self._sql["load_searchable"], {"id": task_id}).fetchall():
            number, state, *task_row = row
            terms = state_term(state)
            with contextlib.suppress(IndexDamagedError):
                terms = f"{task_terms(_to_indexed(task_row).task)} {terms}"
            connection.execute(self._sql["delete_terms"], {"number": number, "terms": terms})
        connection.execute(self._sql["delete_searchable"], {"id": task_id})

    def _make_searchable(self) -> None:
        """Add the terms of tasks without a number: an earlier version indexed them, or their row is damaged.

        A row that cannot be read gets its terms when it is written again.
        """
        ids = [task_id for (task_id,) in self._fetch_all("unsearchable_ids")]
        for start in range(0, len(ids), _SEARCHABLE_BATCH_SIZE):
            with self._connections.write_transaction() as connection:
                for task_id in ids[start : start + _SEARCHABLE_BATCH_SIZE]:
                    for row in connection.execute(self._sql["load_task"], {"id": task_id}).fetchall():
                        with contextlib.suppress(IndexDamagedError):
                            task = _to_indexed(row).task
                            self._delete_searchable(connection, task_id)  # exists if only the row's number was lost
                            number = self._add_searchable(connection, task)
                            connection.execute(self._sql["set_number"], {"id": task_id, "number": number})


def _advice(error: sqlite3.Error | UnicodeDecodeError | OSError, path: Path) -> str:
    if is_disk_full(error, path):
        return "its disk is full, so free up some space and try again"
    return "if it is damaged, stop the server and run: sandbox admin rebuild"


def _open(path: Path, *, read_only: bool) -> Connections:
    connections = Connections(path, read_only=read_only)
    try:
        if read_only:
            require_current_version(connections.writer)
        else:
            migrate(connections.writer, path)
    except BaseException:
        connections.close()
        raise
    return connections


def _row(indexed: IndexedTask) -> dict[str, object]:
    task = indexed.task
    return {
        **_searchable(task),
        "idempotency_key": task.idempotency.key if task.idempotency else None,
        "journal_offset": indexed.offset,
        "task": _encoder.encode(without_large_fields(task)),
        "fold": INDEXED_TASK_VERSION,
        "artifacts": msgspec.json.encode(task.artifacts),
    }


def _searchable(task: Task) -> dict[str, object]:
    return {
        "content": content_digest(task),
        "id": task.id,
        "name": task.manifest.metadata.name,
        "state": task.state.value,
        "created_at": to_microseconds(task.created_at),
        "started_at": to_microseconds(task.started_at) if task.started_at else None,
        "state_changed_at": to_microseconds(task.state_changed_at),
        "cost": to_nanodollars(task.progress.cost_usd),
    }


def _texts(task: Task) -> dict[str, object]:
    prompt, patch = task.manifest.agent.prompt, task.manifest.repository.patch
    return {"id": task.id, "prompt": prompt.encode(), "patch": None if patch is None else patch.encode()}


def _decode_listed(sort: str, task_id: str, value: int | str | None, encoded: bytes) -> ListedRow:
    """Decode a row. Pruning by age relies on the sort order, so the time is compared with the sorted column."""
    return ListedRow(task_id, value, _decode_item(task_id, encoded, value if sort == "state_changed_at" else None))


def _decode_item(task_id: str, encoded: bytes, changed_at: int | str | None = None) -> Task | IndexDamagedError:
    """Decode a task for a list, or return why it cannot be decoded. changed_at: compared with its time, if given."""
    try:
        task = _decode_task(task_id, encoded, decode_task_item)
        if changed_at is not None:
            _check_time(task, changed_at)
    except IndexDamagedError as error:
        return error
    return task


def _cursor_after(row: ListedRow, query: TaskQuery) -> Cursor | None:
    """Return the cursor that continues after a row, or None if the row is too damaged for a cursor."""
    try:
        cursor = to_cursor((row.value, row.id))
        cursor_position(replace(query, cursor=cursor))
    except (InvalidCursorError, TypeError):
        return None
    return cursor


class _DecodedRow(NamedTuple):
    """The decoded fields of a row."""

    task: Task
    artifacts: tuple[Artifact, ...]
    prompt: str
    patch: str | None


def _decode_row(row: Sequence[Any]) -> _DecodedRow:
    *state_columns, artifacts, prompt, patch = row
    task = _decode_state_columns(*state_columns)
    kept = task.manifest.agent.prompt, task.manifest.repository.patch
    texts = kept if kept[0] else (_decode_text(prompt), None if patch is None else _decode_text(patch))
    if not texts[0]:
        raise IndexDamagedError(f"task {task.id} has no prompt")
    return _DecodedRow(task, _decode(_artifacts_decoder.decode, artifacts), *texts)


def _decode_state_columns(task_id: str, encoded: bytes, offset: object, state: object) -> Task:
    task = _decode_task(task_id, encoded, _decoder.decode)
    if not isinstance(offset, int):
        raise IndexDamagedError(f"task {task.id} has no journal offset")
    if task.state != state:
        raise IndexDamagedError(f"task {task.id} is {task.state}, but the column state contains {state!r}")
    return task


def _decode_task(task_id: str, encoded: bytes, decode: Callable[[bytes], Task]) -> Task:
    try:
        task = decode(encoded)
    except _DECODE_ERRORS as error:
        raise IndexDamagedError(error) from error
    if task.id != task_id:
        raise IndexDamagedError(f"the row of task {task_id} contains task {task.id}")
    return task


def _check_time(task: Task, changed_at: object) -> None:
    if to_microseconds(task.state_changed_at) != changed_at:
        column = f"the column state_changed_at contains {changed_at!r}"
        raise IndexDamagedError(f"task {task.id} changed at {task.state_changed_at}, but {column}")


def _decode_text(data: bytes | None) -> str:
    try:
        return (data or b"").decode()
    except ValueError as error:
        raise IndexDamagedError(error) from error


def _to_indexed(row: Sequence[Any]) -> IndexedTask:
    task, artifacts, prompt, patch = _decode_row(row)
    manifest, offset = task.manifest, row[2]
    agent, repository = manifest.agent.with_prompt(prompt), replace(manifest.repository, patch=patch)
    manifest = manifest.replace(agent=agent, repository=repository)
    return IndexedTask(msgspec.structs.replace(task, artifacts=artifacts, manifest=manifest), offset)


def _to_indexed_state(row: Sequence[Any]) -> IndexedTask:
    task = _decode_state_columns(*row)
    return IndexedTask(without_large_fields(msgspec.structs.replace(task, result=None)), row[2])


def _decode(decode: Callable[[bytes], T], encoded: bytes) -> T:
    try:
        return decode(encoded)
    except _DECODE_ERRORS as error:
        raise IndexDamagedError(error) from error


def _is_readable(row: Sequence[Any], changed_at: int) -> bool:
    try:
        _check_time(_decode_row(row).task, changed_at)
    except IndexDamagedError:
        return False
    return True
