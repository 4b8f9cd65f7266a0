"""The states of a task and the allowed transitions."""

from collections.abc import Iterable
from enum import StrEnum


class TaskState(StrEnum):
    """The states of a task."""

    PENDING = "pending"
    STAGING = "staging"
    PROVISIONING = "provisioning"
    READY = "ready"
    RUNNING = "running"
    COMPLETING = "completing"
    COMPLETED = "completed"
    FAILED = "failed"
    FAILED_PRESERVED = "failed_preserved"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the state is final."""
        return self in FINAL_STATES


STATE_ORDER = tuple(TaskState)
"""All states in order. A task never changes to an earlier state, however many attempts it has."""

FINAL_STATES = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.FAILED_PRESERVED, TaskState.CANCELLED})

OUTCOMES: dict[str, frozenset[TaskState]] = {
    "active": frozenset(TaskState) - FINAL_STATES,
    "succeeded": frozenset({TaskState.COMPLETED}),
    "failed": frozenset({TaskState.FAILED, TaskState.FAILED_PRESERVED}),
    "cancelled": frozenset({TaskState.CANCELLED}),
}
"""All states, grouped by outcome. A failed task is `failed_preserved` if its sandbox was preserved."""


def states_matching_filter(states: Iterable[TaskState]) -> frozenset[TaskState]:
    """Return the states that a filter selects: `failed` includes `failed_preserved`, but not the other way around.

    A user who lists failed tasks usually expects those with a preserved sandbox too.
    """
    selected = frozenset(states)
    return selected | OUTCOMES["failed"] if TaskState.FAILED in selected else selected


_EARLY_ENDS = frozenset({TaskState.FAILED, TaskState.CANCELLED})

ALLOWED_TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.PENDING: _EARLY_ENDS | {TaskState.STAGING},
    TaskState.STAGING: _EARLY_ENDS | {TaskState.PROVISIONING},
    TaskState.PROVISIONING: _EARLY_ENDS | {TaskState.READY},
    TaskState.READY: _EARLY_ENDS | {TaskState.RUNNING, TaskState.FAILED_PRESERVED},
    TaskState.RUNNING: frozenset({TaskState.COMPLETING}),
    TaskState.COMPLETING: FINAL_STATES,
    **{state: frozenset() for state in FINAL_STATES},
}
"""The states that may follow each state."""
