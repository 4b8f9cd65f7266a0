"""Reads a page of tasks: in sort order, or by sorting all matches of a rare label or state."""

import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from sandbox.interfaces.store import Cursor, InvalidCursorError, TaskQuery
from sandbox.model.limits import LABELS_MAX
from sandbox.model.task import Task

PagePosition = tuple[int | str | None, str]
"""The value of the sort field (times in microseconds since 1970, UTC) and the task's id."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DIGITS_MAX = 18


def position_of(task: Task, sort: str) -> PagePosition:
    """Return the task's position in the list."""
    if sort == "name":
        return task.manifest.metadata.name, task.id
    at: datetime | None = getattr(task, sort)
    return None if at is None else to_microseconds(at), task.id


def to_cursor(position: PagePosition) -> Cursor:
    """Convert a position to a cursor."""
    value, task_id = position
    return Cursor(None if value is None else str(value), task_id)


def cursor_position(query: TaskQuery) -> PagePosition | None:
    """Return the position after which a query starts, or None for the beginning. Raises InvalidCursorError."""
    cursor = query.cursor
    if cursor is None:
        return None
    value, task_id = cursor.value, cursor.task_id
    if not all(_is_valid_text(text) for text in (task_id, value or "")):
        raise InvalidCursorError
    if value is None and query.sort == "started_at":
        return None, task_id
    if value is not None and query.sort == "name":
        return value, task_id
    digits = (value or "").removeprefix("-")
    if value is None or not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS_MAX):
        raise InvalidCursorError
    return int(value), task_id


def to_microseconds(at: datetime) -> int:
    """Convert a time to microseconds since 1970 (UTC), without loss of precision."""
    return (at - _EPOCH) // _MICROSECOND


def _is_valid_text(text: str) -> bool:
    """Return whether the text has no lone surrogate, which SQLite would reject."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


_SORT_ROWS_MAX = 1000
"""Up to this many matching tasks, sorting them is faster than reading tasks in order until a page is full."""


class ListedRow(NamedTuple):
    """A task's position in the list and its encoded data."""

    id: str
    value: int | str | None
    encoded: bytes


class PageReader:
    """Reads the page of one query. The constructor raises InvalidCursorError."""

    def __init__(self, sql: Mapping[str, str], query: TaskQuery) -> None:
        self._sql = sql
        self._query = query
        self._values: dict[str, object] = {"limit": query.limit + 1, "offset": query.offset}
        self._state_filters = self._build_state_filters()
        self._cursor_filters = self._build_cursor_filters()

    def read(self, connection: sqlite3.Connection) -> tuple[list[ListedRow], int]:
        """Return the rows of the page, plus one if more follow, and the number of rows on all pages."""
        if len(self._query.labels) > LABELS_MAX:
            return [], 0
        counts = self._count_labels(connection)
        if 0 in counts:
            return [], 0
        count = self._count(connection, counts)
        if not counts and self._state_filters and count <= _SORT_ROWS_MAX:
            page = self._format("page_of_rare_states", self._cursor_filters)
        else:
            fits_sort_limit = bool(counts) and counts[0] <= _SORT_ROWS_MAX
            labels = self._build_label_filters(range(int(fits_sort_limit), len(counts)), "tasks.id")
            page = self._format(
                "page_of_rare_label" if fits_sort_limit else "task_page",
                [*self._state_filters, *labels, *self._cursor_filters],
            )
        return [ListedRow(*row) for row in connection.execute(page, self._values)], count

    def _count(self, connection: sqlite3.Connection, counts: list[int]) -> int:
        if len(counts) == 1 and not self._state_filters:
            return counts[0]
        if counts:
            labels = self._build_label_filters(range(1, len(counts)), "labelled.task_id")
            name = "count_labelled_in_states" if self._state_filters else "count_labelled"
            statement = self._format(name, [*self._state_filters, *labels])
        else:
            statement = self._sql["count_in_states" if self._state_filters else "count_all"]
        [count] = connection.execute(statement, self._values).fetchone()
        return int(count)

    def _count_labels(self, connection: sqlite3.Connection) -> list[int]:
        """Count the tasks with each label, rarest first, and number the labels in this order."""
        counted = []
        for key, value in self._query.labels.items():
            [count] = connection.execute(self._sql["count_label"], {"key": key, "value": value}).fetchone()
            counted.append((count, key, value))
            if count == 0:
                break
        counted.sort()
        for number, (_, key, value) in enumerate(counted):
            self._values |= {f"key_{number}": key, f"value_{number}": value}
        return [count for count, _, _ in counted]

    def _build_state_filters(self) -> list[str]:
        if not self._query.states:
            return []
        self._values["states"] = msgspec.json.encode(sorted(self._query.states)).decode()
        return [self._sql["filter_states"]]

    def _build_label_filters(self, numbers: range, task_id: str) -> list[str]:
        return [self._sql["filter_label"].format(number=number, task_id=task_id) for number in numbers]

    def _build_cursor_filters(self) -> list[str]:
        position = cursor_position(self._query)
        if position is None:
            return []
        value, task_id = position
        self._values |= {"cursor_value": value, "cursor_id": task_id}
        sort, comparison = self._query.sort, "<" if self._query.order == "desc" else ">"
        kind = "null" if value is None else "nullable" if sort == "started_at" else "value"
        return [self._sql[f"filter_after_{kind}"].format(sort=sort, comparison=comparison)]

    def _format(self, name: str, conditions: list[str]) -> str:
        filters = " AND ".join(conditions) or self._sql["filter_none"]
        return self._sql[name].format(filters=filters, sort=self._query.sort, order=self._query.order)
