"""In-memory store, for tests."""

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import gt, itemgetter, lt

import msgspec

from sandbox.interfaces.store import ChangedTask, ChangePosition, IndexedTask, TaskPage, TaskQuery, TaskTotals
from sandbox.model.fixed_limits import SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.repository_urls import repository_location, repository_names
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.store.listing import (
    EMPTY_AGENT_SECTION,
    PagePosition,
    cursor_position,
    position_of,
    split_words,
    to_cursor,
    without_patch,
)


def as_task_item(task: Task) -> Task:
    """Return a task as `TaskPage` contains it."""
    manifest = task.manifest.replace(agent=EMPTY_AGENT_SECTION, repository=without_patch(task.manifest.repository))
    message = task.final_message_or_result
    return msgspec.structs.replace(task, artifacts=(), manifest=manifest, result=None, final_message=message)


def as_task_state(task: Task) -> Task:
    """Return a task as `Store.load_without_large_fields` returns it."""
    agent, repository = task.manifest.agent.with_prompt(""), without_patch(task.manifest.repository)
    manifest = task.manifest.replace(agent=agent, repository=repository)
    return msgspec.structs.replace(task, artifacts=(), manifest=manifest, result=None)


class MemoryStore:
    """A thread-safe implementation of `Store` without persistence."""

    def __init__(self) -> None:
        self._tasks: dict[str, IndexedTask] = {}
        self._lock = threading.Lock()
        self._changes: dict[str, int] = {}
        self._last_change = 0

    def save(self, indexed: IndexedTask) -> None:
        """Replace or add a task."""
        with self._lock:
            self._save(indexed)

    def save_all(self, indexed: Sequence[IndexedTask]) -> None:
        """Like `save` for many tasks."""
        with self._lock:
            for each in indexed:
                self._save(each)

    def _save(self, indexed: IndexedTask) -> None:
        known = self._tasks.get(indexed.task.id)
        if known is None or known.task.state is not indexed.task.state:
            self._last_change += 1
            self._changes[indexed.task.id] = self._last_change
        self._tasks[indexed.task.id] = indexed

    def last_change_position(self) -> ChangePosition:
        """Return the position after the latest state change."""
        return ChangePosition("memory", self._last_change)

    def changed_tasks(self, after: ChangePosition, limit: int) -> Sequence[ChangedTask]:
        """Return the tasks whose state changed after a position, and the position after each change."""
        is_known = after.index_id == "memory" and after.number <= self._last_change
        start = after.number if is_known else 0
        changes = sorted((number, task_id) for task_id, number in self._changes.items() if task_id in self._tasks)
        return [
            ChangedTask(ChangePosition("memory", number), as_task_item(self._tasks[task_id].task))
            for number, task_id in changes
            if number > start
        ][:limit]

    def delete(self, task_id: str) -> None:
        """Remove a task from the index."""
        with self._lock:
            self._tasks.pop(task_id, None)

    def outdated_task_ids(self) -> Sequence[str]:
        """Return an empty result, since all tasks were stored by the current version."""
        return ()

    def load(self, task_id: str) -> IndexedTask | None:
        """Return a task, or None if it is unknown."""
        return self._tasks.get(task_id)

    def load_without_large_fields(self, task_id: str) -> IndexedTask | None:
        """Return a task without its prompt, patch, artifacts and the agent's report, or None if it is unknown."""
        indexed = self._tasks.get(task_id)
        return None if indexed is None else IndexedTask(as_task_state(indexed.task), indexed.offset)

    def unfinished(self) -> Sequence[IndexedTask]:
        """Return all tasks that are not in a final state, oldest first."""
        candidates = [indexed for indexed in self._all() if not indexed.task.state.is_final]
        return sorted(candidates, key=lambda indexed: (indexed.task.created_at, indexed.task.id))

    def find_by_idempotency_key(self, key: str, since: datetime) -> IndexedTask | None:
        """Return the newest task submitted with this key at or after `since`."""
        candidates = [indexed for indexed in self._all() if _has_key(indexed.task, key, since)]
        return max(candidates, key=lambda indexed: (indexed.task.created_at, indexed.task.id), default=None)

    def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        """Return the first characters of the tasks' prompts, keyed by task id."""
        known = {task_id: self._tasks[task_id].task for task_id in task_ids if task_id in self._tasks}
        return {task_id: task.manifest.agent.prompt[:length] for task_id, task in known.items()}

    def query(self, query: TaskQuery) -> TaskPage:
        """Return a page of tasks (`as_task_item`). Raises InvalidCursorError."""
        start, is_descending = cursor_position(query), query.order == "desc"

        def rank(position: PagePosition) -> tuple[bool, int | str, str]:
            """Sort tasks without a value last, in ascending and in descending order."""
            value, task_id = position
            return (value is None) is not is_descending, "" if value is None else value, task_id

        matching = [indexed.task for indexed in self._all() if _matches(indexed.task, query)]
        ranked = sorted(((rank(position_of(task, query.sort)), task) for task in matching), key=itemgetter(0))
        if is_descending:
            ranked.reverse()
        if start is not None:
            is_after = lt if is_descending else gt
            ranked = [(position, task) for position, task in ranked if is_after(position, rank(start))]
        end = query.offset + query.limit
        tasks = [as_task_item(task) for _, task in ranked[query.offset : end]]
        has_more = bool(tasks) and len(ranked) > end
        cost_usd = round(sum(task.progress.cost_usd for task in matching), 9)
        return TaskPage(
            tasks,
            len(matching),
            to_cursor(position_of(tasks[-1], query.sort)) if has_more else None,
            totals=TaskTotals(len(matching), cost_usd) if query.with_totals else None,
        )

    def count_by_state(self) -> Mapping[TaskState, int]:
        """Count the tasks in each state; every state is a key."""
        states = [indexed.task.state for indexed in self._all()]
        return {state: states.count(state) for state in TaskState}

    def task_ids(self) -> frozenset[str]:
        """Return the ids of all tasks."""
        return frozenset(indexed.task.id for indexed in self._all())

    def close(self) -> None:
        """Do nothing: there are no resources to release."""

    def _all(self) -> list[IndexedTask]:
        with self._lock:
            return list(self._tasks.values())


def _matches(task: Task, query: TaskQuery) -> bool:
    in_state = not query.states or task.state in query.states
    is_after = query.created_after is None or task.created_at >= query.created_after
    is_before = query.created_before is None or task.created_at < query.created_before
    has_labels = query.labels.items() <= task.manifest.metadata.labels.items()
    is_related = not query.parent or (task.parent is not None and task.parent.task_id == query.parent)
    is_related = is_related and (not query.rerun_of or task.rerun_of == query.rerun_of)
    return in_state and is_after and is_before and has_labels and is_related and _is_found(task, query)


def _is_found(task: Task, query: TaskQuery) -> bool:
    """Compare the words one by one instead of using an index."""
    manifest = task.manifest
    url, prompt = manifest.repository.url, manifest.agent.prompt[:SEARCHED_PROMPT_CHARACTERS_MAX]
    words = split_words(f"{manifest.metadata.name} {task.id} {repository_location(url)} {prompt}")
    if query.repository and repository_location(query.repository) not in repository_names(url):
        return False
    return all(any(word.startswith(sought) for word in words) for sought in split_words(query.search))


def _has_key(task: Task, key: str, since: datetime) -> bool:
    return task.idempotency is not None and task.idempotency.key == key and task.created_at >= since
