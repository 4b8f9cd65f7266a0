"""The life of a task: the one pure function that says what an event does to it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from sandbox.model import events as e
from sandbox.model.errors import SandboxError
from sandbox.model.events import Artifacts
from sandbox.model.retry import find_follow_up, pause_seconds
from sandbox.model.task import Attempt, Beginning, Spent, StateEntry, Task
from sandbox.model.task_state import GRAPH, ORDER, TaskState


class IllegalEventError(SandboxError):
    """The event cannot happen to a task in this state."""

    code = "illegal_event"


class EndAttempt(msgspec.Struct, frozen=True):
    """Effect: stop what the attempt is doing. `force` leaves out the grace between TERM and KILL."""

    force: bool = False


class Finish(msgspec.Struct, frozen=True):
    """Effect: nothing is under way; record `TaskFinished` at once."""


Effect = EndAttempt | Finish


class Advance(msgspec.Struct, frozen=True):
    """The task after an event, what must be done about it, and the change of state, if any."""

    task: Task
    effects: tuple[Effect, ...] = ()
    transition: e.Transition | None = None


def advance(task: Task | None, event: e.Event, *, seq: int, at: datetime) -> Advance:
    """Apply `event` to `task` (None before the first one).

    Raises IllegalEventError, and changes nothing, when the event cannot happen now.
    """
    if task is None:
        return _submit(event, seq=seq, at=at)
    if task.state.is_terminal:
        raise IllegalEventError(f"Task {task.id} is {task.state}; nothing more can happen to it.")
    apply = _RULES.get(type(event))
    if apply is None:
        raise IllegalEventError(f"Task {task.id} was submitted already.")
    changes, target, effects = apply(task, event)
    if isinstance(event, e.AttemptStarted | e.AttemptEnded):
        time = {"started_at": at} if isinstance(event, e.AttemptStarted) else {"ended_at": at}
        changes["attempt"] = msgspec.structs.replace(changes["attempt"], **time)
    after = msgspec.structs.replace(task, last_seq=seq, **changes)
    return _moved(task, after, target or _settled(after), effects, at)


_Outcome = tuple[dict[str, Any], tuple[TaskState, str] | None, tuple[Effect, ...]]


def _submit(event: e.Event, *, seq: int, at: datetime) -> Advance:
    if not isinstance(event, e.TaskSubmitted):
        raise IllegalEventError("A task's first event is its submission.")
    message = "Waiting to be started"
    task = Task(
        id=event.task_id,
        manifest=event.manifest,
        state=TaskState.PENDING,
        state_message=message,
        history=(StateEntry(TaskState.PENDING, at),),
        last_seq=seq,
        idempotency=event.idempotency,
    )
    return Advance(task, transition=e.Transition(None, TaskState.PENDING, message))


def _moved(
    task: Task, after: Task, target: tuple[TaskState, str] | None, effects: tuple[Effect, ...], at: datetime
) -> Advance:
    """Only forward: while a later attempt does again what an earlier one did, the state stays and the message tells."""
    if target is None:
        return Advance(after, effects)
    state, message = target
    if after.attempt is not None and after.attempt.number > 1 and not state.is_terminal:
        message = f"Attempt {after.attempt.number}: {message}"
    if ORDER.index(state) <= ORDER.index(task.state):
        return Advance(msgspec.structs.replace(after, state_message=message), effects)
    if state not in GRAPH[task.state]:
        raise IllegalEventError(f"Task {task.id} cannot go from {task.state} to {state}.")
    history = (*task.history, StateEntry(state, at))
    moved = msgspec.structs.replace(after, state=state, state_message=message, history=history)
    return Advance(moved, effects, e.Transition(task.state, state, message))


def _settled(task: Task) -> tuple[TaskState, str] | None:
    """A task that ran has to do nothing any more but to keep what is there: no agent works, and none will."""
    is_ending = task.cancel is not None or task.failure is not None
    is_over = task.agent_has_exited or (is_ending and task.attempt_state is not TaskState.RUNNING)
    if task.state is TaskState.RUNNING and is_over and find_follow_up(task) is None:
        return TaskState.COMPLETING, "Collecting artifacts"
    return None


def _with_attempt(task: Task, state: TaskState, **changes: Any) -> dict[str, Any]:
    """The next step of the present attempt, from the state that it must have come to."""
    if task.attempt is None or task.attempt_state is not state:
        raise IllegalEventError(f"Task {task.id} has no attempt that is {state}.")
    return {"attempt": msgspec.structs.replace(task.attempt, **changes)}


def _attempt_started(task: Task, event: e.AttemptStarted) -> _Outcome:
    """The first attempt, or the one that follows what was cleared away.

    Earlier versions began anew without clearing away while there was no workspace; their journals are still read.
    """
    before, repository = task.attempt, task.manifest.repository
    if task.cancel is not None or task.failure is not None:
        raise IllegalEventError(f"Task {task.id} is to end; no attempt begins.")
    if before is not None and before.follow_up is None and task.attempt_state is not TaskState.STAGING:
        raise IllegalEventError(f"Attempt {before.id} of task {task.id} was not cleared away.")
    attempt = Attempt(
        event.attempt_id,
        event.runtime,
        event.host,
        number=task.attempts + 1,
        boot_id=event.boot_id,
        resumes=event.resumes,
    )
    past = task.past_attempts if before is None else (*task.past_attempts, before)
    changes = {"attempt": attempt, "attempts": attempt.number, "past_attempts": past, "forgone": ()}
    message = "Taking the disk over" if event.resumes else f"Cloning {repository.url} ({repository.branch})"
    return changes, (TaskState.STAGING, message), ()


def _workspace_prepared(task: Task, event: e.WorkspacePrepared) -> _Outcome:
    message = f"Making the sandbox for commit {event.base_commit[:12]}"
    changes = _with_attempt(task, TaskState.STAGING, base_commit=event.base_commit)
    return changes, (TaskState.PROVISIONING, message), ()


def _sandbox_created(task: Task, event: e.SandboxCreated) -> _Outcome:
    changes = _with_attempt(task, TaskState.PROVISIONING, vm_name=event.vm_name, tier=event.tier, image=event.image)
    return changes, (TaskState.READY, "The sandbox answers"), ()


def _agent_started(task: Task, event: e.AgentStarted) -> _Outcome:
    changes = _with_attempt(task, TaskState.READY, session_id=event.session_id)
    if task.beginning is None and task.attempt is not None:
        changes["beginning"] = Beginning(event.monotonic_seconds, task.attempt.boot_id)
    at_terminal = f"Claude Code is at its terminal: sandbox task attach {task.id}"
    message = "Claude Code is working" if task.manifest.claude.headless else at_terminal
    return changes, (TaskState.RUNNING, message), ()


def _cancel_requested(task: Task, event: e.CancelRequested) -> _Outcome:
    """A wish that comes after the outcome changes nothing; while another attempt is to follow there is none yet."""
    if task.agent_has_exited and find_follow_up(task) is None:
        return {}, None, ()
    force = event.force or (task.cancel is not None and task.cancel.force)
    reason = task.cancel.reason if task.cancel is not None else event.reason
    effect = Finish() if task.state is TaskState.PENDING else EndAttempt(force=force)
    return {"cancel": e.CancelRequested(reason, force)}, None, (effect,)


def _attempt_failed(task: Task, event: e.AttemptFailed) -> _Outcome:
    changes = {} if task.failure else {"failure": event.failure}
    if task.state is TaskState.PENDING:
        return changes, None, (Finish(),)
    return changes, None, () if task.agent_has_exited else (EndAttempt(),)


def _attempt_ended(task: Task, _: e.AttemptEnded) -> _Outcome:
    """The failure was the attempt's; the task has none until its last attempt has."""
    follow_up, attempt = find_follow_up(task), task.attempt
    if follow_up is None or attempt is None or task.failure is None:
        raise IllegalEventError(f"Task {task.id}: no other attempt follows.")
    ended = msgspec.structs.replace(attempt, failure=task.failure, exit_code=task.exit_code, follow_up=follow_up)
    changes = {"attempt": ended, "failure": None, "agent_has_exited": False, "exit_code": None, "result": None}
    wait = pause_seconds(msgspec.structs.replace(task, attempt=ended, failure=None))
    pause = f" in {wait:.15g} s" if wait else ""
    message = f"Attempt {attempt.number} ended with {task.failure.code}; another one follows{pause}"
    return {**changes, "state_message": message}, None, ()


def _follow_up_forgone(task: Task, event: e.FollowUpForgone) -> _Outcome:
    return {"forgone": (*task.forgone, event.follow_up)}, None, ()


def _agent_exited(task: Task, event: e.AgentExited) -> _Outcome:
    """After this event the outcome stands, but for a failure that another attempt follows."""
    changes = _with_attempt(task, TaskState.RUNNING)
    changes |= {
        "agent_has_exited": True,
        "exit_code": event.exit_code,
        "result": event.result,
        "failure": task.failure or event.failure,
        "progress": task.counted,
    }
    return changes, None, ()


def is_followed(task: Task, event: e.AgentExited) -> bool:
    """Whether another attempt would follow this end of the agent. Raises IllegalEventError."""
    return find_follow_up(advance(task, event, seq=task.last_seq + 1, at=task.state_changed_at).task) is not None


def _usage(task: Task, event: e.Usage) -> _Outcome:
    spent, cached = task.spent, event.cache_read_tokens + event.cache_write_tokens
    after = Spent(
        spent.input_tokens + event.input_tokens + cached,
        spent.output_tokens + event.output_tokens,
        round(spent.usd + (event.cost_usd or 0.0), 9),
    )
    return {"spent": after}, None, ()


def _artifact_collected(task: Task, event: e.ArtifactCollected) -> _Outcome:
    known = task.artifacts if isinstance(task.artifacts, Artifacts) else Artifacts(task.artifacts)
    return {"artifacts": known.collected(event.artifact)}, None, ()


def _task_finished(task: Task, _: e.TaskFinished) -> _Outcome:
    return {}, final_state(task), ()


def final_state(task: Task) -> tuple[TaskState, str]:
    """The state that `TaskFinished` would lead to now, and its message.

    Raises IllegalEventError while nothing has ended the task.
    """
    if task.cancel is not None:
        reason = f": {task.cancel.reason}" if task.cancel.reason else ""
        return TaskState.CANCELLED, f"Cancelled{reason}"
    if task.failure is not None:
        return TaskState.FAILED_PRESERVED if task.is_preserved else TaskState.FAILED, task.failure.message
    if task.state is TaskState.COMPLETING:
        return TaskState.COMPLETED, "Claude Code finished its work"
    raise IllegalEventError(f"Task {task.id} is {task.state}: nothing has ended it.")


def _progress(_: Task, event: e.Progress) -> _Outcome:
    return {"progress": event}, None, ()


def _noted(_: Task, __: e.Event) -> _Outcome:
    return {}, None, ()


_RULES: dict[type, Callable[[Task, Any], _Outcome]] = {
    e.AttemptStarted: _attempt_started,
    e.WorkspacePrepared: _workspace_prepared,
    e.SandboxCreated: _sandbox_created,
    e.AgentStarted: _agent_started,
    e.CancelRequested: _cancel_requested,
    e.AttemptFailed: _attempt_failed,
    e.AttemptEnded: _attempt_ended,
    e.FollowUpForgone: _follow_up_forgone,
    e.AgentExited: _agent_exited,
    e.ArtifactCollected: _artifact_collected,
    e.TaskFinished: _task_finished,
    e.Progress: _progress,
    e.Output: _noted,
    e.ToolCall: _noted,
    e.Usage: _usage,
    e.Metrics: _noted,
    e.EgressDenied: _noted,
    e.Gap: _noted,
    e.Trouble: _noted,
}
