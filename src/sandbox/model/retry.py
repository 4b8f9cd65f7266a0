"""What follows an attempt that failed: nothing, or another attempt."""

from __future__ import annotations

from sandbox.model.errors import FailureCode
from sandbox.model.events import RetryKind
from sandbox.model.limits import ATTEMPTS_MAX, RESUMES_MAX, RETRY_BACKOFF_SECONDS, RETRY_BACKOFF_SECONDS_MAX
from sandbox.model.task import Attempt, Task
from sandbox.model.task_state import TaskState

LOST_CODES = frozenset({FailureCode.HOST_LOST, FailureCode.RUNNER_LOST, FailureCode.SANDBOX_LOST})
"""The machine lost the attempt; neither the agent nor its task had a part in it."""

RETRIABLE_CODES = LOST_CODES | {
    FailureCode.AGENT_FAILED,
    FailureCode.AGENT_NO_RESULT,
    FailureCode.DISK_FULL,
    FailureCode.HANG,
    FailureCode.INTERNAL,
    FailureCode.MCP_FAILED,
    FailureCode.OUT_OF_MEMORY,
    FailureCode.PROCESS_LIMIT,
}
"""Ends of an agent that `lifecycle.retries` is about. A bound that was set for the task is none of them."""


def next_retry(task: Task) -> RetryKind | None:
    """What comes after the present attempt, as far as is known: None while it goes on, and when it is the last one.

    An attempt whose agent had not begun is made again, where the machine lost it or its clone broke on the way. One
    whose agent had begun is resumed where the manifest says so and the machine lost it, else retried where it says so.
    """
    attempt, failure = task.attempt, task.failure
    if attempt is None or failure is None or task.cancel is not None or attempt.follow_up is not None:
        return None
    if task.attempt_state is TaskState.RUNNING or task.state is TaskState.COMPLETING or task.state.is_terminal:
        return None
    is_lost = failure.code in LOST_CODES
    if attempt.session_id is None:
        allowed = {RetryKind.RESTART} if is_lost or failure.is_transient else set()
    else:
        allowed = {RetryKind.RESUME} if is_lost and task.manifest.lifecycle.resume else set()
        allowed |= {RetryKind.RETRY} if failure.code in RETRIABLE_CODES else set()
    return next((one for one in RetryKind if one in allowed - {*task.forgone} and _is_within_limit(task, one)), None)


def backoff_seconds(task: Task) -> float:
    """How long to wait between an attempt that has ended and the one that follows it.

    What the machine lost goes on at once; what may fail again for the same reason waits twice as long each time.
    """
    attempt = task.attempt
    if attempt is None or attempt.follow_up is None or attempt.failure is None:
        return 0.0
    if task.cancel is not None or task.failure is not None:  # none follows any more
        return 0.0
    if attempt.follow_up is not RetryKind.RETRY and attempt.failure.code in LOST_CODES:
        return 0.0
    earlier = (
        _count_restarts(task) if attempt.follow_up is RetryKind.RESTART else _count_retries(task, attempt.follow_up)
    )
    return min(RETRY_BACKOFF_SECONDS * 2.0**earlier, RETRY_BACKOFF_SECONDS_MAX)


def _is_within_limit(task: Task, kind: RetryKind) -> bool:
    if kind is RetryKind.RESTART:
        return _count_restarts(task) + 1 < ATTEMPTS_MAX
    return _count_retries(task, kind) < (RESUMES_MAX if kind is RetryKind.RESUME else task.manifest.lifecycle.retries)


def _count_retries(task: Task, kind: RetryKind) -> int:
    """How often this came after an earlier attempt."""
    return sum(attempt.follow_up is kind for attempt in task.past_attempts)


def _count_restarts(task: Task) -> int:
    """Earlier attempts in a row, up to the present one, whose agent did not begin.

    Those of earlier versions were followed without a word of why, and only while they cloned.
    """
    row: list[Attempt] = []
    for attempt in reversed(task.past_attempts):
        if attempt.follow_up not in (RetryKind.RESTART, None):
            break
        row.append(attempt)
    return len(row)
