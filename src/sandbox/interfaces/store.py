"""The index of tasks, which serves the server's queries. It can be rebuilt from the journals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from sandbox.model.errors import FieldError, InvalidParameterError, SandboxError
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState


class DuplicateTaskError(SandboxError):
    """A task with this id exists."""

    code = "duplicate_task_id"

    def __init__(self, existing: Task) -> None:
        super().__init__(f"Task {existing.id} already exists and is {existing.state}; choose another metadata.id.")
        self.existing = existing


class StoreError(SandboxError):
    """The index cannot be read or written now; a requested change was not made."""

    code = "service_unavailable"
    retryable = True


class IndexDamagedError(StoreError):
    """The index, or the row of a task in it, is unreadable; the journals still have the data.

    remedy: what an operator can do, for messages.
    """

    remedy = "stop the server and run: sandbox admin rebuild"

    def __init__(self, reason: object) -> None:
        super().__init__(f"The index of tasks is damaged ({reason}); {self.remedy}")
        self.reason = str(reason)


class InvalidCursorError(InvalidParameterError):
    """The cursor does not match the list's sort order."""

    def __init__(self) -> None:
        message = "belongs to a list in a different order; start without a cursor"
        super().__init__([FieldError.at(("cursor",), "format", message, part="query")])


@dataclass(frozen=True, slots=True)
class IndexedTask:
    """A task and the byte offset up to which its journal is indexed."""

    task: Task
    offset: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in a sorted list: after the task with this sort value (None if the task has no value) and id."""

    value: str | None
    task_id: str


@dataclass(frozen=True, slots=True)
class ChangePosition:
    """A position in the numbered sequence of all tasks' state changes. index_id: the index that numbers them."""

    index_id: str
    number: int


@dataclass(frozen=True, slots=True)
class ChangedTask:
    """A task that changed its state. position: the position after its latest change. task: as in `TaskPage`."""

    position: ChangePosition
    task: Task


Sort = Literal["created_at", "started_at", "state_changed_at", "name", "cost"]
SortDirection = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class TaskQuery:
    """Filter, order and page of a task list. Ties are broken by id.

    cursor: start after this position, regardless of tasks added or changed in the meantime; `offset` counts from it.
    search: words, separated by any other characters. A task matches if each of these words is the beginning of a word
        in its name, id, prompt or repository, ignoring case and accents. Only the beginning of a prompt is searched
        (SEARCHED_PROMPT_CHARACTERS_MAX), and only 16 characters of a word are compared. Every task matches if there are
        no words.
    repository: a URL, or one of `repository_names`, in any case; empty for all.
    parent: the id of the task that the tasks continue; empty for all.
    rerun_of: the id of the task that the tasks run again; empty for all.
    created_after, created_before: the period in which a task was created (UTC); its end is exclusive.
    with_totals: whether the page has the totals of all matching tasks.
    """

    states: frozenset[TaskState] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    sort: Sort = "created_at"
    order: SortDirection = "desc"
    limit: int = 100
    offset: int = 0
    cursor: Cursor | None = None
    search: str = ""
    repository: str = ""
    parent: str = ""
    rerun_of: str = ""
    created_after: datetime | None = None
    created_before: datetime | None = None
    with_totals: bool = False

    @classmethod
    def least_recently_changed_first(cls, states: frozenset[TaskState], cursor: Cursor | None) -> "TaskQuery":
        """Return a query for the tasks in these states, least recently changed first."""
        return cls(states, sort="state_changed_at", order="asc", cursor=cursor)


@dataclass(frozen=True, slots=True)
class TaskTotals:
    """Totals of all tasks that match a query, on all pages. cost_usd: the cost of the tasks' model requests so far."""

    tasks: int = 0
    cost_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskPage:
    """A page of tasks and the total number; `next_cursor` is set if more follow.

    tasks: without artifacts, the patch and the agent's report, and with an empty agent section, because lists do not
        show these.
    damaged: the errors of unreadable rows on the page, keyed by task id. These tasks are not in `tasks`.
    totals: set if the query requests them. They include unreadable rows.
    """

    tasks: Sequence[Task]
    total_count: int
    next_cursor: Cursor | None = None
    damaged: Mapping[str, IndexDamagedError] = field(default_factory=dict)
    totals: TaskTotals | None = None


class Store(Protocol):
    """The index of tasks. Calls block for milliseconds; changes are durable on return. All but `close` may raise
    StoreError.

    Calls that return one task raise IndexDamagedError if its row is unreadable. Calls that return many tasks skip such
    rows and log each one once.
    """

    def save(self, indexed: IndexedTask) -> None:
        """Replace a task and its offset in one transaction. Adds the task if it is unknown."""
        ...

    def save_all(self, indexed: Sequence[IndexedTask]) -> None:
        """Save many tasks in one transaction; see `save`."""
        ...

    def delete(self, task_id: str) -> None:
        """Remove a task from the index; does nothing if the index does not contain it."""
        ...

    def outdated_task_ids(self) -> Sequence[str]:
        """Return the tasks indexed with a different INDEXED_TASK_VERSION, and those whose row is damaged."""
        ...

    def load(self, task_id: str) -> IndexedTask | None:
        """Return the indexed task, or None if the id is unknown."""
        ...

    def load_without_large_fields(self, task_id: str) -> IndexedTask | None:
        """Return a task without its prompt, patch, artifacts and the agent's report, or None if it is unknown.

        Raises StoreError. The omitted fields can contain megabytes.
        """
        ...

    def find_by_idempotency_key(self, key: str, since: datetime) -> IndexedTask | None:
        """Return the newest task submitted with this key at or after `since` (UTC)."""
        ...

    def unfinished(self) -> Sequence[IndexedTask]:
        """Return all tasks in a state that is not final, oldest first, except those whose row is damaged."""
        ...

    def query(self, query: TaskQuery) -> TaskPage:
        """Return a page of tasks. Raises InvalidCursorError."""
        ...

    def last_change_position(self) -> ChangePosition:
        """Return the position after the latest state change."""
        ...

    def changed_tasks(self, after: ChangePosition, limit: int) -> Sequence[ChangedTask]:
        """Return up to `limit` tasks whose state changed after a position, in order of their latest change.

        A position from another index comes before all changes, so all tasks follow it. Empty if no task changed.
        """
        ...

    def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        """Return the beginning of each task's prompt, keyed by task id: at most `length` bytes, as whole characters."""
        ...

    def count_by_state(self) -> Mapping[TaskState, int]:
        """Count the tasks by state; every state is a key. Rows with a damaged state are not counted."""
        ...

    def task_ids(self) -> frozenset[str]:
        """Return the ids of all indexed tasks."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...
