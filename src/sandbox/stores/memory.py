"""The store's twin without a file, for tests."""

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sandbox.contracts.store import DuplicateTaskError, Indexed, TaskPage, TaskQuery
from sandbox.model.state import TaskState
from sandbox.model.task import Task


class MemoryStore:
    """The contract's `Store`, for any thread; forgets everything with its process."""

    def __init__(self) -> None:
        self._known: dict[str, Indexed] = {}
        self._lock = threading.Lock()

    def insert(self, indexed: Indexed) -> None:
        """Add a new task. Raises DuplicateTaskError."""
        with self._lock:
            existing = self._known.get(indexed.task.id)
            if existing is not None:
                raise DuplicateTaskError(existing.task)
            self._known[indexed.task.id] = indexed

    def save(self, indexed: Indexed) -> None:
        """Replace what is known of a task, or add it."""
        with self._lock:
            self._known[indexed.task.id] = indexed

    def load(self, task_id: str) -> Indexed | None:
        """What is known of a task, None for an unknown one."""
        return self._known.get(task_id)

    def unfinished(self) -> Sequence[Indexed]:
        """All tasks in a state that is not terminal, oldest first."""
        found = [indexed for indexed in self._all() if not indexed.task.state.is_terminal]
        return sorted(found, key=lambda indexed: (indexed.task.created_at, indexed.task.id))

    def query(self, query: TaskQuery) -> TaskPage:
        """A page of tasks."""
        matching = [indexed.task for indexed in self._all() if _matches(indexed.task, query)]
        without_value = [task for task in matching if _sort_value(task, query) is None]
        with_value = [task for task in matching if _sort_value(task, query) is not None]
        with_value.sort(key=lambda task: (_sort_value(task, query), task.id), reverse=query.order == "desc")
        without_value.sort(key=lambda task: task.id, reverse=query.order == "desc")
        tasks = with_value + without_value
        return TaskPage(tasks[query.offset : query.offset + query.limit], len(tasks))

    def count_by_state(self) -> Mapping[TaskState, int]:
        """How many tasks are in each state; every state is a key."""
        states = [indexed.task.state for indexed in self._all()]
        return {state: states.count(state) for state in TaskState}

    def task_ids(self) -> frozenset[str]:
        """Every task in the index."""
        return frozenset(indexed.task.id for indexed in self._all())

    def close(self) -> None:
        """Nothing to let go of."""

    def _all(self) -> list[Indexed]:
        with self._lock:
            return list(self._known.values())


def _matches(task: Task, query: TaskQuery) -> bool:
    in_state = not query.states or task.state in query.states
    return in_state and query.labels.items() <= task.manifest.metadata.labels.items()


def _sort_value(task: Task, query: TaskQuery) -> Any:
    value: str | datetime | None = task.manifest.metadata.name if query.sort == "name" else getattr(task, query.sort)
    return value
