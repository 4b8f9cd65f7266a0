"""Retry policy: whether a failed attempt is followed by another one."""

from __future__ import annotations

from sandbox.model.events import FollowUp
from sandbox.model.failure import FailureCode
from sandbox.model.fixed_limits import (
    RESUMES_MAX,
    RETRY_BACKOFF_SECONDS,
    RETRY_BACKOFF_SECONDS_MAX,
    UNSTARTED_ATTEMPTS_MAX,
)
from sandbox.model.task import Attempt, Task
from sandbox.model.task_state import TaskState

LOST_CODES = frozenset({FailureCode.HOST_LOST, FailureCode.RUNNER_LOST, FailureCode.SANDBOX_LOST})
"""Failures of the host, the runner or the sandbox; neither the agent nor the task caused them."""

LOST_ARTIFACTS_CODES = frozenset({FailureCode.HOST_LOST, FailureCode.RUNNER_LOST})
"""Failures after which the artifacts of an agent that has exited cannot be collected any more."""

RETRYABLE_CODES = LOST_CODES | {
    FailureCode.AGENT_FAILED,
    FailureCode.AGENT_NO_RESULT,
    FailureCode.DISK_FULL,
    FailureCode.HANG,
    FailureCode.INTERNAL,
    FailureCode.MCP_FAILED,
    FailureCode.OUT_OF_MEMORY,
    FailureCode.PROCESS_LIMIT,
}
"""The agent's failures that `lifecycle.retries` covers. Exceeding one of the task's limits is not among them."""


def next_follow_up(task: Task) -> FollowUp | None:
    """Return the follow-up of the current attempt, based on the events so far.

    Returns None while the attempt is running, and if no other attempt follows. If the agent had not started, the
    attempt is run again if it was lost (LOST_CODES) or failed temporarily. If the agent had started, a lost agent is
    resumed if the manifest allows it. Otherwise the agent is retried if the manifest allows retries. A failure after
    the agent's exit is followed by a retry only if the artifacts were lost (LOST_ARTIFACTS_CODES).
    """
    attempt, failure = task.attempt, task.failure
    if attempt is None or failure is None or task.cancel is not None or attempt.follow_up is not None:
        return None
    if task.attempt_state is TaskState.RUNNING or task.state.is_final:
        return None
    is_lost = failure.code in LOST_CODES
    if attempt.session_id is None:
        allowed = {FollowUp.AGAIN} if is_lost or failure.is_transient else set()
    else:
        allowed = {FollowUp.RESUME} if is_lost and task.manifest.lifecycle.resume else set()
        allowed |= {FollowUp.RETRY} if failure.code in RETRYABLE_CODES else set()
    return next(
        (one for one in FollowUp if one in allowed - {*task.skipped_follow_ups} and _is_within_limit(task, one)), None
    )


def backoff_seconds(task: Task) -> float:
    """Return the pause between an ended attempt and the next one, in seconds.

    After a lost machine, the next attempt starts immediately. After a failure that may repeat, the pause doubles each
    time.
    """
    attempt = task.attempt
    if attempt is None or attempt.follow_up is None or attempt.failure is None:
        return 0.0
    if task.cancel is not None or task.failure is not None:  # no further attempt follows
        return 0.0
    if attempt.follow_up is not FollowUp.RETRY and attempt.failure.code in LOST_CODES:
        return 0.0
    runs_again = attempt.follow_up is FollowUp.AGAIN
    earlier = _count_unstarted_attempts(task) if runs_again else _count_follow_ups(task, attempt.follow_up)
    return min(RETRY_BACKOFF_SECONDS * 2.0**earlier, RETRY_BACKOFF_SECONDS_MAX)


def _is_within_limit(task: Task, kind: FollowUp) -> bool:
    if kind is FollowUp.AGAIN:
        return _count_unstarted_attempts(task) + 1 < UNSTARTED_ATTEMPTS_MAX
    return _count_follow_ups(task, kind) < (RESUMES_MAX if kind is FollowUp.RESUME else task.manifest.lifecycle.retries)


def _count_follow_ups(task: Task, kind: FollowUp) -> int:
    """Count the earlier attempts that had this follow-up."""
    return sum(attempt.follow_up is kind for attempt in task.past_attempts)


def _count_unstarted_attempts(task: Task) -> int:
    """Count the consecutive attempts, up to the current one, whose agent did not start.

    An attempt without a recorded follow-up counts too. Earlier versions did not record follow-ups, and started another
    attempt only if cloning had failed.
    """
    unstarted: list[Attempt] = []
    for attempt in reversed(task.past_attempts):
        if attempt.follow_up not in (FollowUp.AGAIN, None):
            break
        unstarted.append(attempt)
    return len(unstarted)
