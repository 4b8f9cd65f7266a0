"""Converts a task's failure with its remedy, its attempts and its progress to the bodies that clients receive."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from sandbox.model import events as e
from sandbox.model.display_text import format_timestamp
from sandbox.model.failure import Failure, FailureCode, FailureReason
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Attempt, Task
from sandbox.model.wire.task_bodies import AttemptBody, FailureBody, ProgressBody, RemedyBody


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


_CODES_THAT_NAME_A_FIELD = frozenset(
    {
        FailureCode.BUDGET_EXCEEDED,
        FailureCode.CLONE_FAILED,
        FailureCode.COLLECT_FAILED,
        FailureCode.DISK_FULL,
        FailureCode.HANG,
        FailureCode.OUT_OF_MEMORY,
        FailureCode.PROVISION_TIMEOUT,
        FailureCode.STAGE_TIMEOUT,
        FailureCode.TIMEOUT,
    }
)
"""Failures whose messages come from Sandbox and name a field for which another value may help."""

_REASONS_THAT_NAME_A_FIELD = frozenset({FailureReason.MAX_TURNS})
"""Reasons whose messages name a field of the agent's section for which another value may help."""

_FIELD = re.compile(r"(?<![\w./@-])(lifecycle|repository|vm)\.([a-z_]+)(?![\w/@-]|\.\w)")
"""A field in a message, but not a part of a URL."""

_RERUN_ADVISED_CODES = frozenset(
    {FailureCode.COLLECT_FAILED, FailureCode.HOST_LOST, FailureCode.RUNNER_LOST, FailureCode.SANDBOX_LOST}
)
"""Failures after which the same task may succeed."""

_LIMIT = re.compile(r"(?P<number>[1-9][0-9]{0,5})(?P<unit>[a-zA-Z]{1,3})")


class Remedy(NamedTuple):
    """What to do about a failure.

    field: the manifest's field to change, such as `vm.memory`; empty if there is none.
    overrides: changes to the manifest for a new run; empty if the user chooses them.
    """

    text: str
    field: str = ""
    overrides: tuple[str, ...] = ()


def find_remedy(
    code: FailureCode,
    message: str,
    manifest: Manifest,
    spent: Mapping[str, float] | None = None,
    *,
    reason: str = "",
) -> Remedy | None:
    """Return what to do about a failure; None if only the message says what to do.

    The field to change is the last one that the message names. A limit is doubled, such as `4G` for `2G`. A budget is
    doubled until it exceeds what the task spent, because the last response can cost many times the budget.
    spent: what the task spent, keyed by the budget's field. reason: the failure's reason; empty if it has none.
    """
    if code is FailureCode.AGENT_FAILED and reason in _REASONS_THAT_NAME_A_FIELD:
        return _change_agent_field(message, manifest)
    model_field = f"{manifest.agent.kind}.model"
    # Other invalid requests have the same reason, so check that the message names only the model.
    if reason == FailureReason.MODEL_REQUEST_INVALID and message.endswith(f"; check {model_field}."):
        return Remedy(f"Set {model_field} to a model that the provider offers.", model_field)
    names = reversed(_FIELD.findall(message)) if code in _CODES_THAT_NAME_A_FIELD else ()
    for section, name in names:
        values: Any = getattr(manifest, section)
        if name in {field.name for field in dataclasses.fields(values)}:
            field = f"{section}.{name}"
            return _change_field(field, getattr(values, name), (spent or {}).get(field, 0))
    return Remedy("Run the task again.") if code in _RERUN_ADVISED_CODES else None


def _change_agent_field(message: str, manifest: Manifest) -> Remedy | None:
    """Return the remedy for the last agent setting that the message names, or None if the message names no setting."""
    kind, settings = manifest.agent.kind, manifest.agent.settings
    names = re.findall(rf"(?<![\w./@-]){re.escape(kind)}\.(\w+)(?![\w/@-]|\.\w)", message)
    return next(
        (_change_field(f"{kind}.{name}", settings[name], 0) for name in reversed(names) if name in settings), None
    )


def _change_field(field: str, value: object, spent: float) -> Remedy:
    """Return the remedy that changes this field. New values are proposed only for limits, not for repository fields."""
    if value is None:
        return Remedy(f"Set {field}.", field)
    limit = None if field.startswith("repository.") else double_limit(value)
    if limit is None:
        return Remedy(f"Check {field}.", field)
    if limit == 0:
        return Remedy(f"Raise {field}.", field)
    while not isinstance(limit, str) and limit <= spent:
        limit *= 2
    return Remedy(f"Raise {field}.", field, (f"{field}={limit if isinstance(limit, str) else f'{limit:.12g}'}",))


def double_limit(value: object) -> int | float | str | None:
    """Return twice the value of a manifest's limit, such as `4G` for `2G`; None if the value is not a limit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 2 * value
    limit = _LIMIT.fullmatch(value) if isinstance(value, str) else None
    return f"{2 * int(limit['number'])}{limit['unit']}" if limit else None
