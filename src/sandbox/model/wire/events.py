"""Wire format of events: JSON objects with `type, task_id, seq, timestamp` and the fields of the type."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import msgspec

from sandbox.model import events as e
from sandbox.model.failure import Failure
from sandbox.model.task import Attempt, Task
from sandbox.model.wire.bodies import AttemptBody, FailureBody, ProgressBody

WireEvent = dict[str, Any]

LogStream = Literal["all", "stdout", "stderr", "events", "conversation"]
"""Values of the `stream` parameter of logs. An event belongs to exactly one of the last four, or to none."""


_OVERHEAD_BYTES = 256


def wire_size_bytes(event: WireEvent) -> int:
    """Estimate the memory of an event for limits: its text plus a fixed overhead."""
    size_bytes = _OVERHEAD_BYTES + len(event.get("data", ""))
    if event["type"] in _CONVERSATION_TYPES:
        size_bytes += _conversation_bytes(event)
    return size_bytes + sum(map(wire_size_bytes, event.get("conversation", ())))


def _conversation_bytes(event: WireEvent) -> int:
    match event["type"]:
        case "tool_call_started":
            texts = [event["command"] or "", *event["input"].values()]
            changes = [text for edit in event["edits"] for text in (edit["path"], edit["old"] or "", edit["new"])]
            return sum(map(len, (*texts, *changes))) + _OVERHEAD_BYTES * len(texts)
        case "tool_result":
            return len(event["output"])
        case _:
            return len(event.get("text", ""))


def format_timestamp(at: datetime) -> str:
    """Format a time in UTC as RFC 3339, with milliseconds and `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_wire_event(
    task_id: str, record: e.Record, conversation: Sequence[e.ConversationEvent] | None = None
) -> WireEvent | None:
    """Return the wire event of a record, or None if clients do not see it.

    conversation: events converted from an output record that has none of its own. They become a part of its wire
        event, because they have no seq; a transcript record, which clients do not see otherwise, consists of them only.
    """
    fields = _event_fields(record.event) if record.transition is None else _transition_fields(record.transition)
    if conversation is not None:
        converted = [_tagged_fields(event) for event in conversation]
        fields = {**fields, "parsed": True} if fields is not None else {"type": "conversation"} if converted else None
        if fields is not None:
            fields["conversation"] = converted
    if fields is None:
        return None
    kind = fields.pop("type")
    return {"type": kind, "task_id": task_id, "seq": record.seq, "timestamp": format_timestamp(record.at), **fields}


def end_event(task: Task) -> WireEvent:
    """Return the last event of a finished task. Its number is that of the last record plus one."""
    return {
        "type": "end",
        "task_id": task.id,
        "seq": task.last_seq + 1,
        "timestamp": format_timestamp(task.state_changed_at),
        "state": task.state,
        "exit_code": task.exit_code,
        "error": error_fields(task),
    }


def error_event(task: Task, code: str, message: str) -> WireEvent:
    """Return an error that ends the event stream early. It has the number of the last record, which is not sent."""
    return {
        "type": "error",
        "task_id": task.id,
        "seq": task.last_seq,
        "timestamp": format_timestamp(task.state_changed_at),
        "error": code,
        "message": message,
        "details": None,
    }


def current_state_event(task: Task) -> WireEvent:
    """Return the first event for a client that starts now: the current state, without a previous one."""
    return {
        "type": "state_change",
        "task_id": task.id,
        "seq": task.last_seq,
        "timestamp": format_timestamp(task.state_changed_at),
        "previous_state": None,
        "new_state": task.state,
        "state_message": task.state_message,
    }


def error_fields(task: Task, *, is_operator: bool = False) -> FailureBody | None:
    """Return why a task failed, None unless it did."""
    return None if task.cancel is not None else _failure_body(task.failure, is_operator=is_operator)


def _failure_body(failure: Failure | None, *, is_operator: bool) -> FailureBody | None:
    if failure is None:
        return None
    return {"code": failure.code, "message": failure.message_for(is_operator=is_operator)}


def attempts_fields(task: Task, *, is_operator: bool = False) -> list[AttemptBody]:
    """Return every attempt of a task, oldest first. The last one has the outcome of the task."""
    last = task.attempt
    if last is None:
        return []
    if not task.is_between_attempts:
        last = msgspec.structs.replace(last, failure=task.failure, exit_code=task.exit_code, ended_at=task.finished_at)
    return [_attempt_body(attempt, is_operator=is_operator) for attempt in (*task.past_attempts, last)]


def _attempt_body(attempt: Attempt, *, is_operator: bool) -> AttemptBody:
    return {
        "number": attempt.number,
        "id": attempt.id,
        "started_at": format_timestamp(attempt.started_at) if attempt.started_at else None,
        "ended_at": format_timestamp(attempt.ended_at) if attempt.ended_at else None,
        "resumes": attempt.resumes,
        "exit_code": attempt.exit_code,
        "error": _failure_body(attempt.failure, is_operator=is_operator),
        "followed_by": attempt.follow_up.value if attempt.follow_up else None,
    }


def progress_fields(progress: e.Progress) -> ProgressBody:
    """Return a task's progress. Unknown values are null."""
    at = progress.last_activity_at
    return {
        "output_bytes": progress.output_bytes,
        "tool_calls": progress.tool_calls,
        "current_tool": progress.current_tool,
        "last_activity_at": format_timestamp(at) if at else None,
        "turns": progress.turns,
        "input_tokens": progress.input_tokens,
        "output_tokens": progress.output_tokens,
        "cost_usd": progress.cost_usd,
        "egress_denied": progress.egress_denied,
    }


def log_stream_of(event: WireEvent) -> str | None:
    """Return the log stream of an event: stdout, stderr, events, conversation, or None."""
    if event["type"] == "output":
        return str(event["stream"])
    if event["type"] in _CONVERSATION_TYPES:
        return "conversation"
    return "events" if event["type"] in _LOG_EVENT_TYPES else None


def extract_conversation(event: WireEvent) -> WireEvent | None:
    """Return the conversation that is part of an output event as an event of its own; None if there is none."""
    if event["type"] != "output" or not event.get("conversation"):
        return None
    shared = {key: event[key] for key in ("task_id", "seq", "timestamp", "conversation")}
    return {"type": "conversation", **shared}


_CONVERSATION_TYPES = frozenset({"agent_message", "tool_call_started", "tool_result", "agent_result", "conversation"})
_LOG_EVENT_TYPES = frozenset({"state_change", "attempt", "tool_call", "usage", "egress_denied", "gap", "error"})


def _transition_fields(transition: e.Transition) -> dict[str, Any]:
    return {
        "type": "state_change",
        "previous_state": transition.previous_state,
        "new_state": transition.new_state,
        "state_message": transition.message,
    }


def _event_fields(event: e.Event) -> dict[str, Any] | None:
    match event:
        case e.Output() as output if output.stream != "transcript":
            return {
                "type": "output",
                "stream": output.stream,
                "data": output.display_text,
                "bytes": len(output.data),
                "continued": output.continued,
                "parsed": output.parsed,
            }
        case e.Progress() as progress:
            return {"type": "progress", "progress": progress_fields(progress)}
        case e.Metrics() as metrics:
            return {"type": "metrics", "metrics": msgspec.structs.asdict(metrics)}
        case e.ErrorReported() as error:
            return {"type": "error", "error": error.error, "message": error.message, "details": None}
        case e.AttemptStarted() as started if started.number > 1:
            return {
                "type": "attempt",
                "attempt": started.number,
                "attempt_id": started.attempt_id,
                "resumes": started.resumes,
            }
        case e.AttemptFailed(Failure() as failure) | e.AgentExited(failure=Failure() as failure):
            return {"type": "error", "error": failure.code, "message": failure.message, "details": None}
        case _:
            return _tagged_fields(event) if isinstance(event, _UNCHANGED_EVENTS) else None


_UNCHANGED_EVENTS = (e.ToolCall, e.Usage, e.EgressDenied, e.Gap, *get_args(e.ConversationEvent))
"""Events whose fields clients see as they are."""


def _tagged_fields(event: msgspec.Struct) -> dict[str, Any]:
    """Return all fields of an event, with its tag as `type`."""
    fields = {"type": type(event).__struct_config__.tag, **msgspec.structs.asdict(event)}
    if isinstance(event, e.ToolCallStarted):
        fields["edits"] = [msgspec.structs.asdict(edit) for edit in event.edits]
    return fields
