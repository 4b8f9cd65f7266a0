"""Converts records of the journal to the events that clients receive. `event_bodies.py` declares these events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sandbox.model import events as e
from sandbox.model.display_text import format_timestamp
from sandbox.model.failure import Failure
from sandbox.model.task import Task
from sandbox.model.wire import event_bodies as b
from sandbox.model.wire.task_conversion import progress_body, task_failure_body

WireEvent = b.Event

LogStream = Literal["all", "stdout", "stderr", "events", "conversation"]
"""Values of the `stream` parameter of logs. An event belongs to exactly one of the last four, or to none."""


_OVERHEAD_BYTES = 256
_CHARACTER_BYTES_MAX = 8
"""Maximum memory of a non-ASCII character: four bytes in the text, and four in the encoder's UTF-8 copy."""


def estimate_memory_bytes(event: WireEvent) -> int:
    """Estimate the memory used by an event, for limits: its text plus a fixed overhead."""
    if event["type"] == "output":
        return _OVERHEAD_BYTES + _text_size_bytes(event["data"]) + estimate_conversation_memory_bytes(event)
    if event["type"] == "conversation":
        return _OVERHEAD_BYTES + estimate_conversation_memory_bytes(event)
    if (
        event["type"] == "agent_message"
        or event["type"] == "tool_call_started"
        or event["type"] == "tool_result"
        or event["type"] == "agent_result"
    ):
        return _item_size_bytes(event)
    return _OVERHEAD_BYTES


def estimate_conversation_memory_bytes(event: WireEvent) -> int:
    """Estimate the memory used by an event's conversation items, which were converted from output."""
    if event["type"] == "output" or event["type"] == "conversation":
        return sum(map(_item_size_bytes, event.get("conversation", ())))
    return 0


def _item_size_bytes(item: b.ConversationItem) -> int:
    if item["type"] == "tool_call_started":
        texts = [item["command"] or "", *item["input"].values()]
        changes = [text for edit in item["edits"] for text in (edit["path"], edit["old"] or "", edit["new"])]
        return _OVERHEAD_BYTES + sum(map(_text_size_bytes, (*texts, *changes))) + _OVERHEAD_BYTES * len(texts)
    return _OVERHEAD_BYTES + _text_size_bytes(item["output"] if item["type"] == "tool_result" else item["text"])


def _text_size_bytes(text: str) -> int:
    return len(text) if text.isascii() else _CHARACTER_BYTES_MAX * len(text)


def to_wire_event(
    task_id: str, record: e.Record, conversation: Sequence[e.ConversationEvent] | None = None
) -> WireEvent | None:
    """Return the wire event of a record, or None if clients do not see it.

    conversation: events converted from an output record without conversation events. They have no seq, so they become a
        part of the output record's wire event. The wire event of a transcript record contains only these events.
    """
    base: b.BaseEvent = {"task_id": task_id, "seq": record.seq, "timestamp": format_timestamp(record.at)}
    if record.transition is not None:
        previous = record.transition.previous_state
        return {
            "type": "state_change",
            **base,
            "previous_state": None if previous is None else previous.value,
            "new_state": record.transition.new_state.value,
            "state_message": record.transition.message,
        }
    match record.event:
        case e.Output() as output:
            return _output_event(base, output, conversation)
        case e.AgentMessage() | e.ToolCallStarted() | e.ToolResult() | e.AgentResult() as event:
            return _conversation_event(base, event)
        case event:
            return _other_event(base, event)


def _output_event(
    base: b.BaseEvent, output: e.Output, conversation: Sequence[e.ConversationEvent] | None
) -> b.OutputEvent | b.ConversationEvent | None:
    items = None if conversation is None else list(map(_conversation_item, conversation))
    if output.stream == "transcript":
        return {"type": "conversation", **base, "conversation": items} if items else None
    event: b.OutputEvent = {
        "type": "output",
        "task_id": base["task_id"],
        "seq": base["seq"],
        "timestamp": base["timestamp"],
        "stream": output.stream,
        "data": output.display_text,
        "bytes": len(output.data),
        "continued": output.is_continued,
        "parsed": output.is_parsed or items is not None,
    }
    if items is not None:
        event["conversation"] = items
    return event


def _conversation_event(base: b.BaseEvent, event: e.ConversationEvent) -> WireEvent:
    item = _conversation_item(event)
    match item["type"]:
        case "agent_message":
            return {"type": "agent_message", **base, **item}
        case "tool_call_started":
            return {"type": "tool_call_started", **base, **item}
        case "tool_result":
            return {"type": "tool_result", **base, **item}
        case "agent_result":
            return {"type": "agent_result", **base, **item}


def _conversation_item(event: e.ConversationEvent) -> b.ConversationItem:
    match event:
        case e.AgentMessage():
            return {
                "type": "agent_message",
                "text": event.text,
                "kind": event.kind,
                "parent_tool_use_id": event.parent_tool_use_id,
                "omitted_characters": event.omitted_characters,
            }
        case e.ToolCallStarted():
            return {
                "type": "tool_call_started",
                "tool": event.tool,
                "tool_use_id": event.tool_use_id,
                "summary": event.summary,
                "command": event.command,
                "edits": [{"path": edit.path, "old": edit.old, "new": edit.new} for edit in event.edits],
                "input": event.input,
                "parent_tool_use_id": event.parent_tool_use_id,
                "omitted_characters": event.omitted_characters,
                "omitted_fields": event.omitted_fields,
            }
        case e.ToolResult():
            return {
                "type": "tool_result",
                "tool_use_id": event.tool_use_id,
                "output": event.output,
                "is_error": event.is_error,
                "exit_code": event.exit_code,
                "omitted_characters": event.omitted_characters,
                "in_background": event.in_background,
            }
        case e.AgentResult():
            return {
                "type": "agent_result",
                "text": event.text,
                "is_error": event.is_error,
                "reason": event.reason,
                "turns": event.turns,
                "duration_ms": event.duration_ms,
                "cost_usd": event.cost_usd,
                "omitted_characters": event.omitted_characters,
            }


def _other_event(base: b.BaseEvent, event: e.Event) -> WireEvent | None:
    match event:
        case e.Progress():
            return {"type": "progress", **base, "progress": progress_body(event)}
        case e.Metrics():
            return {"type": "metrics", **base, "metrics": _metrics_body(event)}
        case e.AttemptStarted() if event.number > 1:
            return {
                "type": "attempt",
                **base,
                "attempt": event.number,
                "attempt_id": event.attempt_id,
                "resumes": event.resumes,
            }
        case e.ErrorReported():
            return {"type": "error", **base, "error": event.error, "message": event.message, "details": None}
        case e.AttemptFailed(Failure() as failure) | e.AgentExited(failure=Failure() as failure):
            return {"type": "error", **base, "error": failure.code, "message": failure.message, "details": None}
        case e.ToolCallEnded() | e.Usage() | e.EgressDenied() | e.Gap():
            return _unchanged_event(base, event)
        case _:
            return None


def _metrics_body(metrics: e.Metrics) -> b.MetricsBody:
    return {
        "cpu_percent": metrics.cpu_percent,
        "memory_used_bytes": metrics.memory_used_bytes,
        "memory_total_bytes": metrics.memory_total_bytes,
        "disk_used_bytes": metrics.disk_used_bytes,
        "disk_total_bytes": metrics.disk_total_bytes,
        "load_avg": metrics.load_avg,
    }


def _unchanged_event(base: b.BaseEvent, event: e.ToolCallEnded | e.Usage | e.EgressDenied | e.Gap) -> WireEvent:
    """Return the wire event of an event whose fields are copied unchanged."""
    match event:
        case e.ToolCallEnded():
            return {
                "type": "tool_call",
                **base,
                "tool": event.tool,
                "tool_use_id": event.tool_use_id,
                "duration_ms": event.duration_ms,
                "is_error": event.is_error,
            }
        case e.Usage():
            return {
                "type": "usage",
                **base,
                "model": event.model,
                "input_tokens": event.input_tokens,
                "output_tokens": event.output_tokens,
                "cache_read_tokens": event.cache_read_tokens,
                "cache_write_tokens": event.cache_write_tokens,
                "cost_usd": event.cost_usd,
            }
        case e.EgressDenied():
            return {"type": "egress_denied", **base, "host": event.host, "port": event.port, "reason": event.reason}
        case e.Gap():
            return {
                "type": "gap",
                **base,
                "first_seq": event.first_seq,
                "last_seq": event.last_seq,
                "reason": event.reason,
            }


def end_event(task: Task) -> b.EndEvent:
    """Return the last event of a finished task. Its `seq` is one higher than the last record's."""
    return {
        "type": "end",
        "task_id": task.id,
        "seq": task.last_seq + 1,
        "timestamp": format_timestamp(task.state_changed_at),
        "state": task.state.value,
        "exit_code": task.exit_code,
        "error": task_failure_body(task),
    }


def error_event(task: Task, code: str, message: str) -> b.ErrorEvent:
    """Return an error in place of events that cannot be read.

    It has the `seq` of the last record, because that record is not sent.
    """
    return {
        "type": "error",
        "task_id": task.id,
        "seq": task.last_seq,
        "timestamp": format_timestamp(task.state_changed_at),
        "error": code,
        "message": message,
        "details": None,
    }


def current_state_event(task: Task) -> b.StateChangeEvent:
    """Return the first event of a stream that replays no past events: it has the current state, but no previous one."""
    return {
        "type": "state_change",
        "task_id": task.id,
        "seq": task.last_seq,
        "timestamp": format_timestamp(task.state_changed_at),
        "previous_state": None,
        "new_state": task.state.value,
        "state_message": task.state_message,
    }


def log_stream_of(event: WireEvent) -> str | None:
    """Return the log stream of an event: stdout, stderr, events, conversation, or None."""
    if event["type"] == "output":
        return event["stream"]
    if event["type"] in b.CONVERSATION_TYPES:
        return "conversation"
    return None if event["type"] in _TYPES_WITHOUT_STREAM else "events"


_TYPES_WITHOUT_STREAM = frozenset({"progress", "metrics", "end"})


def extract_conversation(event: WireEvent) -> b.ConversationEvent | None:
    """Return the conversation in an output event as a separate event; None if it contains no conversation."""
    if event["type"] != "output" or not event.get("conversation"):
        return None
    return {
        "type": "conversation",
        "task_id": event["task_id"],
        "seq": event["seq"],
        "timestamp": event["timestamp"],
        "conversation": event["conversation"],
    }
