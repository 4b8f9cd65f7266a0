"""The index of tasks: what the server answers questions from. It can be rebuilt from the journals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol

import msgspec

from sandbox.model.errors import SandboxError
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState


class DuplicateTaskError(SandboxError):
    """A task with this id exists."""

    code = "duplicate_task_id"

    def __init__(self, existing: Task) -> None:
        super().__init__(f"Task {existing.id} exists already and is {existing.state}; choose another metadata.id.")
        self.existing = existing


class StoreError(SandboxError):
    """The index cannot be read or written at the moment; what it was asked to change is unchanged."""

    code = "service_unavailable"
    retryable = True


class IndexDamagedError(StoreError):
    """What the index holds of a task cannot be read; its journal tells it."""

    def __init__(self, reason: object) -> None:
        super().__init__(
            f"The index of tasks is damaged ({reason}); start the server again, "
            "or stop it and run: sandbox admin rebuild"
        )


class InvalidCursorError(SandboxError):
    """The place cannot be one in a list that is sorted like this."""

    code = "invalid_parameter"

    def __init__(self) -> None:
        super().__init__("This cursor does not belong to a list of this order; begin without one.")


@dataclass(frozen=True, slots=True)
class IndexedTask:
    """A task and how far its journal has been read into the index (byte offset)."""

    task: Task
    offset: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a sorted list: behind the task with this value of the sorted field (None: it has none) and this id."""

    value: str | None
    task_id: str


@dataclass(frozen=True, slots=True)
class TaskQuery:
    """Which tasks, in which order, and which page of them. Ties are broken by id.

    cursor: begin behind this place, whatever was added or changed meanwhile; `offset` counts from there.
    """

    states: frozenset[TaskState] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    sort: Literal["created_at", "started_at", "state_changed_at", "name"] = "created_at"
    order: Literal["asc", "desc"] = "desc"
    limit: int = 100
    offset: int = 0
    cursor: Cursor | None = None


@dataclass(frozen=True, slots=True)
class TaskPage:
    """A page of tasks, `as_listed`, and how many there are in all; `next_cursor` where more follow.

    damaged: why rows of the page could not be read, by the ids of their tasks, which are not among `tasks`.
    """

    tasks: Sequence[Task]
    total_count: int
    next_cursor: Cursor | None = None
    damaged: Mapping[str, str] = field(default_factory=dict)


def without_large_fields(task: Task) -> Task:
    """Without what may be large and no list shows: its artifacts, its prompt and its patch."""
    manifest = task.manifest
    claude, repository = replace(manifest.claude, prompt=""), replace(manifest.repository, patch=None)
    return msgspec.structs.replace(task, artifacts=(), manifest=replace(manifest, claude=claude, repository=repository))


class Store(Protocol):
    """Calls block on the disk for milliseconds; what returned is durable. Each but `close` may raise StoreError.

    Those that give one task raise IndexDamagedError where its row cannot be read. Those that give many leave such rows
    out, and log each one once.
    """

    def insert(self, indexed: IndexedTask) -> None:
        """Add a new task. Raises DuplicateTaskError."""
        ...

    def save(self, indexed: IndexedTask) -> None:
        """Replace what is known of a task, and its offset with it, in one transaction. Unknown tasks are added."""
        ...

    def save_all(self, indexed: Sequence[IndexedTask]) -> None:
        """`save` for many, all of them or none."""
        ...

    def delete(self, task_id: str) -> None:
        """Take a task out of the index; nothing happens where it is not in."""
        ...

    def outdated_task_ids(self) -> Sequence[str]:
        """The tasks that a program with other rules worked out of their journals (see `FOLD`), and those whose row is
        damaged."""
        ...

    def load(self, task_id: str) -> IndexedTask | None:
        """What is known of a task, None for an unknown one."""
        ...

    def find_by_idempotency_key(self, key: str, since: datetime) -> IndexedTask | None:
        """The newest task that was submitted with this key, not before `since` (UTC)."""
        ...

    def unfinished(self) -> Sequence[IndexedTask]:
        """All tasks in a state that is not terminal, oldest first; without those whose row is damaged."""
        ...

    def query(self, query: TaskQuery) -> TaskPage:
        """A page of tasks, `as_listed`. Raises InvalidCursorError."""
        ...

    def count_by_state(self) -> Mapping[TaskState, int]:
        """How many tasks are in each state; every state is a key. Rows with a damaged state are not counted."""
        ...

    def task_ids(self) -> frozenset[str]:
        """Every task in the index."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
