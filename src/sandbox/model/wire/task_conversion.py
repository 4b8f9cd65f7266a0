"""Converts a task's failure, attempts and progress to the bodies that clients receive."""

from datetime import UTC, datetime

import msgspec

from sandbox.model import events as e
from sandbox.model.failure import Failure, Remedy, find_remedy
from sandbox.model.task import Attempt, Task
from sandbox.model.wire.task_bodies import AttemptBody, FailureBody, ProgressBody, RemedyBody


def format_timestamp(at: datetime) -> str:
    """Format a time in UTC as RFC 3339, with milliseconds and `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def task_failure_body(task: Task, *, is_operator: bool = False) -> FailureBody | None:
    """Return why a task failed, or None if it did not fail."""
    return None if task.cancel is not None else failure_body(task, task.failure, is_operator=is_operator)


def failure_body(task: Task, failure: Failure | None, *, is_operator: bool) -> FailureBody | None:
    """Return a failure with what to do about it, or None if there is no failure."""
    if failure is None:
        return None
    progress = task.progress
    spent = {
        "lifecycle.budget_usd": progress.cost_usd,
        "lifecycle.budget_tokens": progress.input_tokens + progress.output_tokens,
    }
    remedy = find_remedy(failure.code, failure.message, task.manifest, spent, reason=failure.reason)
    return {
        "code": failure.code,
        "reason": failure.reason or None,
        "message": failure.message_for(is_operator=is_operator),
        "remedy": None if remedy is None else _remedy_body(remedy),
    }


def _remedy_body(remedy: Remedy) -> RemedyBody:
    return {"text": remedy.text, "field": remedy.field or None, "overrides": list(remedy.overrides)}


def attempt_bodies(task: Task, *, is_operator: bool = False) -> list[AttemptBody]:
    """Return every attempt of a task, oldest first. The last one has the outcome of the task.

    A cancelled attempt has no error, because the cancel request caused the agent's end.
    """
    last = task.attempt
    if last is None:
        return []
    if not task.is_between_attempts:
        failure = None if task.cancel is not None else task.failure
        last = msgspec.structs.replace(last, failure=failure, exit_code=task.exit_code, ended_at=task.finished_at)
    return [_attempt_body(task, attempt, is_operator=is_operator) for attempt in (*task.past_attempts, last)]


def _attempt_body(task: Task, attempt: Attempt, *, is_operator: bool) -> AttemptBody:
    return {
        "number": attempt.number,
        "id": attempt.id,
        "started_at": format_timestamp(attempt.started_at) if attempt.started_at else None,
        "ended_at": format_timestamp(attempt.ended_at) if attempt.ended_at else None,
        "resumes": attempt.resumes,
        "exit_code": attempt.exit_code,
        "error": failure_body(task, attempt.failure, is_operator=is_operator),
        "followed_by": attempt.follow_up.value if attempt.follow_up else None,
    }


def progress_body(progress: e.Progress) -> ProgressBody:
    """Return a task's progress. Unknown values are null."""
    at = progress.last_activity_at
    return {
        "output_bytes": progress.output_bytes,
        "tool_calls": progress.tool_calls,
        "current_tool": progress.current_tool,
        "current_subject": progress.current_subject,
        "last_activity_at": format_timestamp(at) if at else None,
        "turns": progress.turns,
        "input_tokens": progress.input_tokens,
        "output_tokens": progress.output_tokens,
        "cost_usd": progress.cost_usd,
        "egress_denied": progress.egress_denied,
    }
