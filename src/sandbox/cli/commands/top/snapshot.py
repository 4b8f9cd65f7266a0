"""The tasks and the state of the server at one point in time, and the filter that selects the tasks."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import AsyncClient, Health, TaskSummary
    from sandbox.client.requests import TaskFilters

UNFINISHED_MAX = 500
ENDED_MAX = 100

_ACTIVE_STATES = ("running", "completing", "ready", "provisioning", "staging", "pending")
STATE_FILTERS = {
    "all": frozenset(TaskState),
    "active": frozenset(map(TaskState, _ACTIVE_STATES)) - {TaskState.PENDING},
    "pending": frozenset({TaskState.PENDING}),
    "failed": frozenset({TaskState.FAILED, TaskState.FAILED_PRESERVED}),
    "completed": frozenset({TaskState.COMPLETED}),
    "cancelled": frozenset({TaskState.CANCELLED}),
}
"""The states that each filter selects."""

_STATE_ORDER = {state: index for index, state in enumerate(_ACTIVE_STATES)}


@dataclass(frozen=True)
class TaskFilter:
    """Selects the tasks to fetch. search: the words to search for. states: a key of `STATE_FILTERS`."""

    search: str = ""
    states: str = "all"

    def next_states(self) -> TaskFilter:
        """Return the filter with the next group of states."""
        names = list(STATE_FILTERS)
        return replace(self, states=names[(names.index(self.states) + 1) % len(names)])

    def __str__(self) -> str:
        parts = [f"Search: {self.search}"] if self.search else []
        return " · ".join([*parts, *([f"Only {self.states} tasks"] if self.states != "all" else [])])


@dataclass(frozen=True)
class Snapshot:
    """Health and tasks at one point in time.

    tasks: active tasks, then pending tasks, then ended tasks, the latest first.
    omitted_count: number of tasks that are not included.
    """

    health: Health
    tasks: tuple[TaskSummary, ...]
    omitted_count: int


def _query(task_filter: TaskFilter, states: Set[TaskState]) -> TaskFilters:
    query: TaskFilters = {"states": sorted(states)}
    return {**query, "search": task_filter.search} if task_filter.search else query


async def fetch_snapshot(client: AsyncClient, task_filter: TaskFilter | None = None) -> Snapshot:
    """Fetch the data from the server. Raises ClientError."""
    task_filter = task_filter or TaskFilter()
    states = STATE_FILTERS[task_filter.states]
    health = await client.health()
    pages = [
        await client.tasks(**_query(task_filter, group & states), limit=limit, sort=sort, order=order)
        for group, limit, sort, order in (
            (frozenset(TaskState) - FINAL_STATES, UNFINISHED_MAX, "created_at", "asc"),
            (FINAL_STATES, ENDED_MAX, "state_changed_at", "desc"),
        )
        if group & states
    ]
    tasks = [task for page in pages for task in page["tasks"]]
    ordered = sorted(tasks, key=lambda task: _STATE_ORDER.get(task["state"], len(_STATE_ORDER)))
    return Snapshot(health, tuple(ordered), sum(page["total_count"] for page in pages) - len(tasks))
