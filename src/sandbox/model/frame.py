"""What a client sees of a record: JSON objects with `type, task_id, seq, timestamp` and the type's own fields."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from sandbox.model import event as e
from sandbox.model.task import Task

Frame = dict[str, Any]

LogStream = Literal["all", "stdout", "stderr", "events"]
"""What `stream=` of the logs takes; a frame belongs to exactly one of the last three, or to none."""


def timestamp(at: datetime) -> str:
    """UTC, RFC 3339 with milliseconds and `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def frame(task_id: str, record: e.Record) -> Frame | None:
    """The frame of a record; None where it is nothing that clients are shown."""
    fields = _fields(record)
    if fields is None:
        return None
    kind = fields.pop("type")
    return {"type": kind, "task_id": task_id, "seq": record.seq, "timestamp": timestamp(record.at), **fields}


def end_frame(task: Task) -> Frame:
    """The last frame of a finished task. It takes the number after the last record's, which no record has."""
    return {
        "type": "end",
        "task_id": task.id,
        "seq": task.last_seq + 1,
        "timestamp": timestamp(task.state_changed_at),
        "state": task.state,
        "exit_code": task.exit_code,
        "error": error(task),
    }


def present_state_frame(task: Task) -> Frame:
    """The first frame for a client that begins now: the present state, without a previous one."""
    return {
        "type": "state_change",
        "task_id": task.id,
        "seq": task.last_seq,
        "timestamp": timestamp(task.state_changed_at),
        "previous_state": None,
        "new_state": task.state,
        "state_message": task.state_message,
    }


def error(task: Task) -> dict[str, str] | None:
    """`{code, message}` of a failed task."""
    if task.failure is None or task.cancel is not None:
        return None
    return {"code": task.failure.code, "message": task.failure.message}


def progress_fields(progress: e.Progress) -> dict[str, Any]:
    """The counters of a task as JSON, every key present."""
    fields: dict[str, Any] = msgspec.structs.asdict(progress)
    at = progress.last_activity_at
    return {**fields, "last_activity_at": timestamp(at) if at else None}


def log_stream(shown: Frame) -> str | None:
    """The log stream a frame belongs to: stdout, stderr, events, or None."""
    if shown["type"] == "output":
        return str(shown["stream"])
    return "events" if shown["type"] in _LOGGED_EVENTS else None


_LOGGED_EVENTS = frozenset({"state_change", "tool_call", "usage", "egress_denied", "gap", "error"})


def _fields(record: e.Record) -> dict[str, Any] | None:
    if record.transition is not None:
        change = record.transition
        return {
            "type": "state_change",
            "previous_state": change.previous_state,
            "new_state": change.new_state,
            "state_message": change.message,
        }
    match record.event:
        case e.Output() as output if output.stream != "transcript":
            return {
                "type": "output",
                "stream": output.stream,
                "data": output.shown,
                "bytes": len(output.data),
                "continued": output.continued,
            }
        case e.Progress() as progress:
            return {"type": "progress", "progress": progress_fields(progress)}
        case e.Metrics() as metrics:
            return {"type": "metrics", "metrics": msgspec.structs.asdict(metrics)}
        case e.Trouble() as trouble:
            return {"type": "error", "error": trouble.error, "message": trouble.message, "details": None}
        case e.AttemptFailed(failure):
            return {"type": "error", "error": failure.code, "message": failure.message, "details": None}
        case e.ToolCall() | e.Usage() | e.EgressDenied() | e.Gap() as told:
            return {"type": type(told).__struct_config__.tag, **msgspec.structs.asdict(told)}
        case _:
            return None
