"""The task state machine: a pure function that applies an event to a task, and the retry policy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from sandbox.model import events as e
from sandbox.model.artifacts import GENERATED_DIRECTORY, Artifacts
from sandbox.model.errors import SandboxError
from sandbox.model.events import FollowUp
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import (
    RESUMES_MAX,
    RETRY_BACKOFF_SECONDS,
    RETRY_BACKOFF_SECONDS_MAX,
    UNSTARTED_ATTEMPTS_MAX,
)
from sandbox.model.task import AgentStartTime, Attempt, StateHistoryEntry, Task, TotalUsage
from sandbox.model.task_state import ALLOWED_TRANSITIONS, STATE_ORDER, TaskState

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
    attempt is run again if it was lost (LOST_CODES) or failed for a temporary reason. If the agent had started, a lost
    agent is resumed if the manifest allows it. Otherwise, the agent is retried if the manifest allows retries and the
    failure is in RETRYABLE_CODES. A failure after the agent's exit is followed by a retry only if the artifacts were
    lost (LOST_ARTIFACTS_CODES). Each kind of follow-up has a limit (`_is_within_limit`), and skipped ones are left out.
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

    If a lost attempt (LOST_CODES) is run again or resumed, the next attempt starts immediately. Otherwise, the pause
    doubles each time.
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


class IllegalEventError(SandboxError):
    """The event is not allowed in the current state of the task."""

    code = "illegal_event"


class StopAttempt(msgspec.Struct, frozen=True):
    """Effect: stop the running attempt. `force` skips the grace period between SIGTERM and SIGKILL."""

    force: bool = False


Effect = StopAttempt
"""An action of the attempt's runner, performed once the event is on disk.

An event of a task without an attempt has no effects, because there is no runner to perform them. The process that
records the reason for the end of such a task also records `TaskFinished`.
"""


class AdvanceResult(msgspec.Struct, frozen=True):
    """The task after an event, the effects to run, and the change of state, if any."""

    task: Task
    effects: tuple[Effect, ...] = ()
    transition: e.Transition | None = None


def advance(task: Task | None, event: e.Event, *, seq: int, at: datetime) -> AdvanceResult:
    """Apply `event` to `task` (None before the first event).

    Raises IllegalEventError, and changes nothing, if the event is not allowed now.
    """
    if task is None:
        return _task_submitted(event, seq=seq, at=at)
    if task.state.is_final:
        raise IllegalEventError(f"Task {task.id} is already {task.state}.")
    apply = _HANDLERS.get(type(event))
    if apply is None:
        raise IllegalEventError(f"Task {task.id} was already submitted.")
    changes, target, effects = apply(task, event)
    if isinstance(event, e.AttemptStarted | e.AttemptTornDown):
        time = {"started_at": at} if isinstance(event, e.AttemptStarted) else {"ended_at": at}
        changes["attempt"] = msgspec.structs.replace(changes["attempt"], **time)
    if task.cancel is None and changes.get("cancel") is not None:
        changes["cancel_requested_at"] = at
    after = msgspec.structs.replace(task, last_seq=seq, **changes)
    return _apply_transition(task, after, target or _completing_target(after), effects, at)


def replay(task: Task | None, record: e.Record) -> Task:
    """Apply a record that was read from a journal. Raises IllegalEventError."""
    return with_recorded_message(advance(task, record.event, seq=record.seq, at=record.at).task, record)


def with_recorded_message(after: Task, record: e.Record) -> Task:
    """Return the task after a record, with the message of the recorded change of state.

    An earlier version may have used a different message.
    """
    transition = record.transition
    if transition is None or transition.new_state is not after.state or transition.message == after.state_message:
        return after
    return msgspec.structs.replace(after, state_message=transition.message)


_HandlerResult = tuple[dict[str, Any], tuple[TaskState, str] | None, tuple[Effect, ...]]


def _task_submitted(event: e.Event, *, seq: int, at: datetime) -> AdvanceResult:
    if not isinstance(event, e.TaskSubmitted):
        raise IllegalEventError("The first event of a task must be its submission.")
    message = "Waiting to be started"
    task = Task(
        id=event.task_id,
        manifest=event.manifest,
        state=TaskState.PENDING,
        state_message=message,
        history=(StateHistoryEntry(TaskState.PENDING, at),),
        last_seq=seq,
        idempotency=event.idempotency,
        parent=event.parent,
        rerun_of=event.rerun_of,
    )
    return AdvanceResult(task, transition=e.Transition(None, TaskState.PENDING, message))


def _apply_transition(
    task: Task, updated: Task, target: tuple[TaskState, str] | None, effects: tuple[Effect, ...], at: datetime
) -> AdvanceResult:
    """Change the state, never backwards. While a later attempt repeats steps, only the message changes."""
    if target is None:
        return AdvanceResult(updated, effects)
    state, message = target
    if updated.attempt is not None and updated.attempt.number > 1 and not state.is_final:
        message = f"Attempt {updated.attempt.number}: {message}"
    if STATE_ORDER.index(state) <= STATE_ORDER.index(task.state):
        return AdvanceResult(msgspec.structs.replace(updated, state_message=message), effects)
    if state not in ALLOWED_TRANSITIONS[task.state]:
        raise IllegalEventError(f"Task {task.id} cannot go from {task.state} to {state}.")
    history = (*task.history, StateHistoryEntry(state, at))
    moved = msgspec.structs.replace(updated, state=state, state_message=message, history=history)
    return AdvanceResult(moved, effects, e.Transition(task.state, state, message))


def _completing_target(task: Task) -> tuple[TaskState, str] | None:
    """Return COMPLETING and its message once no agent is running and no other attempt follows, otherwise None."""
    is_ending = task.cancel is not None or task.failure is not None
    is_over = task.agent_has_exited or (is_ending and task.attempt_state is not TaskState.RUNNING)
    if task.state is TaskState.RUNNING and is_over and next_follow_up(task) is None:
        return TaskState.COMPLETING, "Collecting artifacts"
    return None


def _update_attempt(task: Task, state: TaskState, **changes: Any) -> dict[str, Any]:
    """Update the current attempt, which must be in `state`."""
    if task.attempt is None or task.attempt_state is not state:
        raise IllegalEventError(f"Task {task.id} has no attempt that is {state}.")
    return {"attempt": msgspec.structs.replace(task.attempt, **changes)}


def _attempt_started(task: Task, event: e.AttemptStarted) -> _HandlerResult:
    """Start the first attempt, or the follow-up of one that was torn down.

    Earlier versions started another attempt without a teardown if there was no workspace yet.
    """
    before, repository = task.attempt, task.manifest.repository
    if task.cancel is not None or task.failure is not None:
        raise IllegalEventError(f"Task {task.id} must end, so no attempt can start.")
    if before is not None and before.follow_up is None and task.attempt_state is not TaskState.STAGING:
        raise IllegalEventError(f"Attempt {before.id} of task {task.id} was not torn down.")
    attempt = Attempt(
        event.attempt_id,
        event.runtime,
        event.host,
        number=task.attempt_count + 1,
        boot_id=event.boot_id,
        resumes=event.resumes,
    )
    past = task.past_attempts if before is None else (*task.past_attempts, before)
    changes = {"attempt": attempt, "attempt_count": attempt.number, "past_attempts": past, "skipped_follow_ups": ()}
    message = "Taking over the disk" if event.resumes else f"Cloning {repository.url} ({repository.branch})"
    return changes, (TaskState.STAGING, message), ()


def _workspace_prepared(task: Task, event: e.WorkspacePrepared) -> _HandlerResult:
    message = f"Creating the sandbox for commit {event.base_commit[:12]}"
    changes = _update_attempt(task, TaskState.STAGING, base_commit=event.base_commit)
    return changes, (TaskState.PROVISIONING, message), ()


def _sandbox_created(task: Task, event: e.SandboxCreated) -> _HandlerResult:
    changes = _update_attempt(
        task, TaskState.PROVISIONING, sandbox_name=event.sandbox_name, tier=event.tier, image=event.image
    )
    return changes, (TaskState.READY, "The sandbox is ready"), ()


def _agent_started(task: Task, event: e.AgentStarted) -> _HandlerResult:
    changes = _update_attempt(task, TaskState.READY, session_id=event.session_id)
    if task.agent_start_time is None and task.attempt is not None:
        changes["agent_start_time"] = AgentStartTime(event.monotonic_seconds, task.attempt.boot_id)
    changes["agent_name"] = name = event.agent or task.agent_name
    in_terminal = f"{name} is running in its terminal: sandbox task attach {task.id}"
    message = in_terminal if task.manifest.agent.is_interactive else f"{name} is working"
    return changes, (TaskState.RUNNING, message), ()


def _cancel_requested(task: Task, event: e.CancelRequested) -> _HandlerResult:
    """Record the request, unless the outcome is already final.

    The outcome is not final if another attempt follows.
    """
    if task.agent_has_exited and next_follow_up(task) is None:
        return {}, None, ()
    force = event.force or (task.cancel is not None and task.cancel.force)
    reason = task.cancel.reason if task.cancel is not None else event.reason
    effects = () if task.attempt is None else (StopAttempt(force=force),)
    return {"cancel": e.CancelRequested(reason, force)}, None, effects


def _attempt_failed(task: Task, event: e.AttemptFailed) -> _HandlerResult:
    changes: dict[str, Any] = {} if task.failure else {"failure": event.failure}
    if task.agent_has_exited and not task.failure:
        allowed = {FollowUp.RETRY} if event.failure.code in LOST_ARTIFACTS_CODES else set()
        changes["skipped_follow_ups"] = tuple(one for one in FollowUp if one not in allowed)
    return changes, None, () if task.attempt is None or task.agent_has_exited else (StopAttempt(),)


def _attempt_torn_down(task: Task, _: e.AttemptTornDown) -> _HandlerResult:
    """Move the failure from the task to the attempt. The task has no failure until the next attempt fails."""
    follow_up, attempt = next_follow_up(task), task.attempt
    if follow_up is None or attempt is None or task.failure is None:
        raise IllegalEventError(f"Task {task.id} cannot start another attempt.")
    ended = msgspec.structs.replace(attempt, failure=task.failure, exit_code=task.exit_code, follow_up=follow_up)
    changes = {"attempt": ended, "failure": None, "agent_has_exited": False}
    changes |= dict.fromkeys(("exit_code", "result", "final_message"))
    wait = backoff_seconds(msgspec.structs.replace(task, attempt=ended, failure=None))
    pause = f" in {wait:.15g} s" if wait else ""
    message = f"Attempt {attempt.number} ended with {task.failure.code}; another attempt follows{pause}"
    return {**changes, "state_message": message}, None, ()


def _follow_up_skipped(task: Task, event: e.FollowUpSkipped) -> _HandlerResult:
    """Record each skipped follow-up only once, because an untrusted host may send millions of these events."""
    if event.follow_up in task.skipped_follow_ups:
        return {}, None, ()
    return {"skipped_follow_ups": (*task.skipped_follow_ups, event.follow_up)}, None, ()


def _agent_exited(task: Task, event: e.AgentExited) -> _HandlerResult:
    """Record the outcome of the agent. It is final unless another attempt follows."""
    changes = _update_attempt(task, TaskState.RUNNING)
    changes |= {
        "agent_has_exited": True,
        "exit_code": event.exit_code,
        "result": event.result,
        "final_message": event.final_message,
        "failure": task.failure or event.failure,
        "progress": task.final_progress,
    }
    return changes, None, ()


def failure_event(task: Task, failure: Failure) -> e.AgentExited | e.AttemptFailed:
    """Return the event that records a failure: `AgentExited` if the agent is running, otherwise `AttemptFailed`."""
    if task.attempt_state is TaskState.RUNNING:
        return e.AgentExited(None, None, failure)
    return e.AttemptFailed(failure)


def will_be_followed_up(task: Task, event: e.AgentExited) -> bool:
    """Return whether another attempt would follow if the agent exited in this way. Raises IllegalEventError."""
    return next_follow_up(advance(task, event, seq=task.last_seq + 1, at=task.state_changed_at).task) is not None


def _usage(task: Task, event: e.Usage) -> _HandlerResult:
    spent, cached = task.spent, event.cache_read_tokens + event.cache_write_tokens
    after = TotalUsage(
        min(spent.input_tokens + event.input_tokens + cached, e.TOKENS_TOTAL_MAX),
        min(spent.output_tokens + event.output_tokens, e.TOKENS_TOTAL_MAX),
        round(spent.usd + (event.cost_usd or 0.0), 9),
    )
    return {"spent": after}, None, ()


def _artifact_collected(task: Task, event: e.ArtifactCollected) -> _HandlerResult:
    artifacts = task.artifacts if isinstance(task.artifacts, Artifacts) else Artifacts(task.artifacts)
    changes: dict[str, Any] = {"artifacts": artifacts.with_artifact(event.artifact)}
    if event.artifact.path == f"{GENERATED_DIRECTORY}/{task.id}.patch":
        changes["diff"] = event.diff
    return changes, None, ()


def _task_finished(task: Task, _: e.TaskFinished) -> _HandlerResult:
    return {}, final_state(task), ()


def final_state(task: Task) -> tuple[TaskState, str]:
    """Return the state that `TaskFinished` would lead to now, and its message.

    Raises IllegalEventError while nothing has ended the task.
    """
    if task.cancel is not None:
        reason = f": {task.cancel.reason}" if task.cancel.reason else ""
        return TaskState.CANCELLED, f"Cancelled{reason}"
    if task.failure is not None:
        return TaskState.FAILED_PRESERVED if task.is_preserved_on_failure else TaskState.FAILED, task.failure.message
    if task.state is TaskState.COMPLETING and task.agent_has_exited:
        return TaskState.COMPLETED, f"{task.agent_name} finished its work"
    raise IllegalEventError(f"Task {task.id} is {task.state} and cannot end yet.")


def _progress(_: Task, event: e.Progress) -> _HandlerResult:
    return {"progress": event}, None, ()


def _no_change(_: Task, __: e.Event) -> _HandlerResult:
    return {}, None, ()


_HANDLERS: dict[type, Callable[[Task, Any], _HandlerResult]] = {
    e.AttemptStarted: _attempt_started,
    e.WorkspacePrepared: _workspace_prepared,
    e.SandboxCreated: _sandbox_created,
    e.AgentStarted: _agent_started,
    e.CancelRequested: _cancel_requested,
    e.AttemptFailed: _attempt_failed,
    e.AttemptTornDown: _attempt_torn_down,
    e.FollowUpSkipped: _follow_up_skipped,
    e.AgentExited: _agent_exited,
    e.ArtifactCollected: _artifact_collected,
    e.TaskFinished: _task_finished,
    e.Progress: _progress,
    e.Output: _no_change,
    e.AgentMessage: _no_change,
    e.ToolCallStarted: _no_change,
    e.ToolResult: _no_change,
    e.AgentResult: _no_change,
    e.ToolCallEnded: _no_change,
    e.Usage: _usage,
    e.Metrics: _no_change,
    e.EgressDenied: _no_change,
    e.Gap: _no_change,
    e.ErrorReported: _no_change,
}
