"""Where a task stands in a sorted list, and how a cursor writes that down."""

from datetime import UTC, datetime, timedelta

from sandbox.contracts.store import Cursor, InvalidCursorError, TaskQuery
from sandbox.model.task import Task

Place = tuple[int | str | None, str]
"""The value of the sorted field (times are microseconds since 1970 in UTC), and the id."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DIGITS_MAX = 18


def place_of(task: Task, sort: str) -> Place:
    """Where the task stands."""
    if sort == "name":
        return task.manifest.metadata.name, task.id
    at: datetime | None = getattr(task, sort)
    return None if at is None else microseconds(at), task.id


def cursor_of(place: Place) -> Cursor:
    """The place, as a cursor."""
    value, task_id = place
    return Cursor(None if value is None else str(value), task_id)


def cursor_place(query: TaskQuery) -> Place | None:
    """The place that a query begins behind, None for the beginning. Raises InvalidCursorError."""
    cursor = query.cursor
    if cursor is None:
        return None
    value, task_id = cursor.value, cursor.task_id
    if not all(_is_text(text) for text in (task_id, value or "")):
        raise InvalidCursorError
    if value is None and query.sort == "started_at":
        return None, task_id
    if value is not None and query.sort == "name":
        return value, task_id
    digits = (value or "").removeprefix("-")
    if value is None or not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS_MAX):
        raise InvalidCursorError
    return int(value), task_id


def microseconds(at: datetime) -> int:
    """Whole numbers sort as the times do and lose nothing."""
    return (at - _EPOCH) // _MICROSECOND


def _is_text(text: str) -> bool:
    """Half a surrogate pair is no text that a database takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
