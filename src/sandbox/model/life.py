"""The life of a task: the one pure function that says what an event does to it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from sandbox.model import event as e
from sandbox.model.errors import SandboxError
from sandbox.model.state import GRAPH, TaskState
from sandbox.model.task import Attempt, StateEntry, Task


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
    return _moved(task, changes, target, effects, seq=seq, at=at)


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
    task: Task,
    changes: dict[str, Any],
    target: tuple[TaskState, str] | None,
    effects: tuple[Effect, ...],
    *,
    seq: int,
    at: datetime,
) -> Advance:
    transition = None
    if target is not None:
        state, message = target
        if state not in GRAPH[task.state]:
            raise IllegalEventError(f"Task {task.id} cannot go from {task.state} to {state}.")
        transition = e.Transition(task.state, state, message)
        changes |= {
            "state": state,
            "state_message": message,
            "history": (*task.history, StateEntry(state, at)),
        }
    after = msgspec.structs.replace(task, last_seq=seq, **changes)
    return Advance(after, effects, transition)


def _with_attempt(task: Task, **changes: Any) -> dict[str, Any]:
    if task.attempt is None:
        raise IllegalEventError(f"Task {task.id} has no attempt yet.")
    return {"attempt": msgspec.structs.replace(task.attempt, **changes)}


def _attempt_started(task: Task, event: e.AttemptStarted) -> _Outcome:
    """The first attempt, or another one where the last one's runner died before it had a workspace."""
    repository = task.manifest.repository
    attempt = Attempt(event.attempt_id, event.runtime, event.host, boot_id=event.boot_id)
    changes = {"attempt": attempt, "attempts": task.attempts + 1}
    if task.may_be_attempted_again:
        return changes, None, ()
    return changes, (TaskState.STAGING, f"Cloning {repository.url} ({repository.branch})"), ()


def _workspace_prepared(task: Task, event: e.WorkspacePrepared) -> _Outcome:
    message = f"Making the sandbox for commit {event.base_commit[:12]}"
    return _with_attempt(task, base_commit=event.base_commit), (TaskState.PROVISIONING, message), ()


def _sandbox_created(task: Task, event: e.SandboxCreated) -> _Outcome:
    changes = _with_attempt(task, vm_name=event.vm_name, tier=event.tier, image=event.image)
    return changes, (TaskState.READY, "The sandbox answers"), ()


def _agent_started(task: Task, event: e.AgentStarted) -> _Outcome:
    changes = _with_attempt(task, session_id=event.session_id)
    return changes, (TaskState.RUNNING, "Claude Code is working"), ()


def _cancel_requested(task: Task, event: e.CancelRequested) -> _Outcome:
    """A wish that comes after the outcome changes nothing."""
    if task.agent_has_exited:
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


def _agent_exited(task: Task, event: e.AgentExited) -> _Outcome:
    """After this event the outcome stands: a later wish to cancel no longer changes it."""
    changes: dict[str, Any] = {
        "agent_has_exited": True,
        "exit_code": event.exit_code,
        "result": event.result,
        "failure": task.failure or event.failure,
    }
    return changes, (TaskState.COMPLETING, "Collecting artifacts"), ()


def _artifact_collected(task: Task, event: e.ArtifactCollected) -> _Outcome:
    kept = tuple(artifact for artifact in task.artifacts if artifact.name != event.artifact.name)
    return {"artifacts": (*kept, event.artifact)}, None, ()


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
    e.AgentExited: _agent_exited,
    e.ArtifactCollected: _artifact_collected,
    e.TaskFinished: _task_finished,
    e.Progress: _progress,
    e.Output: _noted,
    e.ToolCall: _noted,
    e.Usage: _noted,
    e.Metrics: _noted,
    e.EgressDenied: _noted,
    e.Gap: _noted,
    e.Trouble: _noted,
}
