"""Wire events for journal records, and the log stream of each event."""

import sys
from typing import Any, get_args

import msgspec
import pytest
from pydantic import ConfigDict, TypeAdapter

from doubles.manifests import decode_record, encode_json
from doubles.timed_out_task import FAILURE, FORMATTED_TIMESTAMP, MANIFEST, TIMESTAMP, timed_out_task
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.task_state import TaskState
from sandbox.model.wire import event_bodies
from sandbox.model.wire.event_conversion import (
    LogStream,
    current_state_event,
    end_event,
    error_event,
    estimate_memory_bytes,
    extract_conversation,
    log_stream_of,
    to_wire_event,
)

WIRE_EXAMPLES: dict[type, tuple[e.Event, dict[str, Any] | None]] = {
    e.TaskSubmitted: (e.TaskSubmitted("t", MANIFEST), None),
    e.AttemptStarted: (
        e.AttemptStarted("abcdefgh2345", "bubblewrap", "here", number=2, resumes=True),
        {"type": "attempt", "attempt": 2, "attempt_id": "abcdefgh2345", "resumes": True},
    ),
    e.WorkspacePrepared: (e.WorkspacePrepared("0" * 40), None),
    e.SandboxCreated: (e.SandboxCreated("sandbox-x", "namespaces", "host"), None),
    e.AgentStarted: (e.AgentStarted("id"), None),
    e.Output: (
        e.Output.from_bytes("stderr", b"h\xc3\xa4\xff\n", is_continued=True),
        {"type": "output", "stream": "stderr", "data": "h\u00e4\ufffd\n", "bytes": 5, "continued": True,
         "parsed": False},
    ),
    e.AgentMessage: (
        e.AgentMessage("Hello.", "thinking", "toolu_0", 7),
        {"type": "agent_message", "text": "Hello.", "kind": "thinking", "parent_tool_use_id": "toolu_0",
         "omitted_characters": 7},
    ),
    e.ToolCallStarted: (
        e.ToolCallStarted("Edit", "toolu_1", "a.py", None, (e.FileEdit("a.py", None, "x"),), {"b": "1"}),
        {"type": "tool_call_started", "tool": "Edit", "tool_use_id": "toolu_1", "summary": "a.py", "command": None,
         "edits": [{"path": "a.py", "old": None, "new": "x"}], "input": {"b": "1"}, "parent_tool_use_id": None,
         "omitted_characters": 0, "omitted_fields": 0},
    ),
    e.ToolResult: (
        e.ToolResult("toolu_1", "Exit code 1", True, 1),
        {"type": "tool_result", "tool_use_id": "toolu_1", "output": "Exit code 1", "is_error": True, "exit_code": 1,
         "omitted_characters": 0, "in_background": False},
    ),
    e.AgentResult: (
        e.AgentResult("Done.", False, "", 4, 5, 0.5),
        {"type": "agent_result", "text": "Done.", "is_error": False, "reason": "", "turns": 4, "duration_ms": 5,
         "cost_usd": 0.5, "omitted_characters": 0},
    ),
    e.ToolCallEnded: (
        e.ToolCallEnded("Bash", "toolu_1", 12, True),
        {"type": "tool_call", "tool": "Bash", "tool_use_id": "toolu_1", "duration_ms": 12, "is_error": True},
    ),
    e.Usage: (
        e.Usage("m", 1, 2, 3, 4, 0.5),
        {"type": "usage", "model": "m", "input_tokens": 1, "output_tokens": 2, "cache_read_tokens": 3,
         "cache_write_tokens": 4, "cost_usd": 0.5},
    ),
    e.Progress: (
        e.Progress(1, 2, "Bash", TIMESTAMP, 3, 4, 5, 0.5, 6, 7, "npm test"),
        {"type": "progress", "progress": {"output_bytes": 1, "tool_calls": 2, "current_tool": "Bash",
         "current_subject": "npm test",
         "last_activity_at": FORMATTED_TIMESTAMP, "turns": 3, "input_tokens": 4, "output_tokens": 5, "cost_usd": 0.5,
         "egress_denied": 6}},
    ),
    e.Metrics: (
        e.Metrics(12.5, 1, 2, 3, 4, 0.5),
        {"type": "metrics", "metrics": {"cpu_percent": 12.5, "memory_used_bytes": 1, "memory_total_bytes": 2,
         "disk_used_bytes": 3, "disk_total_bytes": 4, "load_avg": 0.5}},
    ),
    e.EgressDenied: (
        e.EgressDenied("git.example", 443, "not allowed"),
        {"type": "egress_denied", "host": "git.example", "port": 443, "reason": "not allowed"},
    ),
    e.Gap: (e.Gap(4, 9, "full"), {"type": "gap", "first_seq": 4, "last_seq": 9, "reason": "full"}),
    e.ErrorReported: (
        e.ErrorReported("journal_full", "No space."),
        {"type": "error", "error": "journal_full", "message": "No space.", "details": None},
    ),
    e.CancelRequested: (e.CancelRequested("why", True), None),
    e.AttemptFailed: (
        e.AttemptFailed(FAILURE),
        {"type": "error", "error": "timeout", "message": "It took too long.", "details": None},
    ),
    e.AttemptTornDown: (e.AttemptTornDown(), None),
    e.FollowUpSkipped: (e.FollowUpSkipped(e.FollowUp.RETRY, "not allowed"), None),
    e.AgentExited: (
        e.AgentExited(1, {"is_error": True}, FAILURE),
        {"type": "error", "error": "timeout", "message": "It took too long.", "details": None},
    ),
    e.ArtifactCollected: (e.ArtifactCollected(Artifact("a", "a", 1, "text/plain", "sha256:" + "0" * 64, True)), None),
    e.TaskFinished: (e.TaskFinished(), None),
}  # fmt: skip
EXAMPLES = [example for example, _ in WIRE_EXAMPLES.values()]


def test_every_event_type_has_an_example():
    assert set(WIRE_EXAMPLES) == set(e.Event.__args__)


@pytest.mark.parametrize(("event", "fields"), WIRE_EXAMPLES.values(), ids=lambda value: type(value).__name__)
def test_every_event_is_converted_or_omitted(event, fields):
    wire_event = to_wire_event("t", e.Record(7, 1, TIMESTAMP, event))
    expected = None
    if fields is not None:
        expected = {"type": fields["type"], "task_id": "t", "seq": 7, "timestamp": FORMATTED_TIMESTAMP, **fields}
    assert msgspec.json.encode(wire_event) == msgspec.json.encode(expected)  # in this order


EVENT_ADAPTER = TypeAdapter(event_bodies.Event, config=ConfigDict(extra="forbid", strict=True))


def wire_events():
    """Yield wire events of every kind."""
    for event in EXAMPLES:
        yield to_wire_event("t", e.Record(7, 1, TIMESTAMP, event))
    conversation = [event for event in EXAMPLES if isinstance(event, e.ConversationEvent)]
    for stream in ("stdout", "transcript"):
        yield to_wire_event("t", e.Record(7, 1, TIMESTAMP, e.Output.from_bytes(stream, b"{}\n")), conversation)
    for transition in (e.Transition(None, TaskState.PENDING, ""), e.Transition(TaskState.READY, TaskState.RUNNING, "")):
        yield to_wire_event("t", e.Record(7, 1, TIMESTAMP, e.TaskFinished(), transition))
    yield from (
        end_event(timed_out_task()),
        current_state_event(timed_out_task()),
        error_event(timed_out_task(), "code", "message"),
    )


def test_wire_events_match_their_declarations():
    events = [event for event in wire_events() if event is not None]
    for event in events:
        EVENT_ADAPTER.validate_json(msgspec.json.encode(event))
    assert {event["type"] for event in events} == event_bodies.EVENT_TYPES


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_record_with_a_transition_becomes_a_state_change(event):
    transition = e.Transition(TaskState.READY, TaskState.RUNNING, "Claude Code is working")
    assert to_wire_event("t", e.Record(7, 1, TIMESTAMP, event, transition)) == {
        "type": "state_change",
        "task_id": "t",
        "seq": 7,
        "timestamp": FORMATTED_TIMESTAMP,
        "previous_state": "ready",
        "new_state": "running",
        "state_message": "Claude Code is working",
    }


def test_transcript_output_is_omitted():
    assert to_wire_event("t", e.Record(7, 1, TIMESTAMP, e.Output.from_bytes("transcript", b"{}\n"))) is None


CONVERTED = [{"type": "agent_message", "text": "Hello.", "kind": "text", "parent_tool_use_id": None,
              "omitted_characters": 0}]  # fmt: skip


def test_converted_conversation_is_part_of_the_output_event():
    record = e.Record(7, 1, TIMESTAMP, e.Output.from_bytes("stdout", b"{}\n"))
    wire_event = to_wire_event("t", record, [e.AgentMessage("Hello.")])
    assert (wire_event["data"], wire_event["parsed"], wire_event["conversation"]) == ("{}\n", True, CONVERTED)
    assert log_stream_of(wire_event) == "stdout"
    extracted = {
        "type": "conversation",
        "task_id": "t",
        "seq": 7,
        "timestamp": FORMATTED_TIMESTAMP,
        "conversation": CONVERTED,
    }
    assert extract_conversation(wire_event) == extracted
    assert extract_conversation(to_wire_event("t", record, [])) is None
    assert to_wire_event("t", record, [])["parsed"] is True


def test_converted_conversation_of_a_transcript_is_a_separate_event():
    record = e.Record(7, 1, TIMESTAMP, e.Output.from_bytes("transcript", b"{}\n"))
    assert to_wire_event("t", record, []) is None
    wire_event = to_wire_event("t", record, [e.AgentMessage("Hello.")])
    assert (wire_event["type"], wire_event["conversation"]) == ("conversation", CONVERTED)
    assert log_stream_of(wire_event) == "conversation"


@pytest.mark.parametrize(
    ("event", "characters"),
    [
        (e.Output("stdout", "x" * 1000), 1000),
        (e.AgentMessage("x" * 1000), 1000),
        (e.ToolCallStarted("Bash", "t", command="x" * 1000), 1000),
        (e.ToolCallStarted("Edit", "t", edits=(e.FileEdit("x" * 100, "x" * 400, "x" * 500),)), 1000),
        (e.ToolCallStarted("Tool", "t", input={"a": "x" * 500, "b": "x" * 500}), 1000),
        (e.ToolResult("t", "x" * 1000), 1000),
        (e.AgentResult("x" * 1000), 1000),
        (e.ToolCallEnded("Bash", "t", 1), 0),
    ],
)
def test_size_of_a_wire_event_includes_its_texts(event, characters):
    size_bytes = estimate_memory_bytes(to_wire_event("t", e.Record(7, 1, TIMESTAMP, event)))
    assert characters <= size_bytes <= characters + 1100


def test_size_of_wide_text_includes_the_copy_that_the_encoder_keeps():
    text = chr(0x1F600) * 1000
    wire_event = to_wire_event("t", e.Record(7, 1, TIMESTAMP, e.Output("stdout", text)))
    msgspec.json.encode(wire_event)
    assert sys.getsizeof(wire_event["data"]) <= estimate_memory_bytes(wire_event) <= 9000


def test_size_of_output_includes_its_converted_conversation():
    record = e.Record(7, 1, TIMESTAMP, e.Output("stdout", "x" * 1000))
    assert estimate_memory_bytes(to_wire_event("t", record, [e.AgentMessage("x" * 1000)] * 2)) >= 3000
    transcript = e.Record(7, 1, TIMESTAMP, e.Output("transcript", "x" * 1000))
    assert 2000 <= estimate_memory_bytes(to_wire_event("t", transcript, [e.AgentMessage("x" * 1000)] * 2)) < 3000


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_wire_events_are_json(event):
    wire_event = to_wire_event("t", e.Record(7, 1, TIMESTAMP, event))
    assert msgspec.json.decode(msgspec.json.encode(wire_event)) == wire_event


def test_each_wire_event_type_has_at_most_one_log_stream():
    streams: dict[str, set[str | None]] = {}
    transition = e.Transition(None, TaskState.PENDING, "Waiting")
    records = [e.Record(1, 1, TIMESTAMP, event) for event in EXAMPLES] + [
        e.Record(1, 1, TIMESTAMP, EXAMPLES[0], transition)
    ]
    records.append(e.Record(1, 1, TIMESTAMP, e.Output.from_bytes("stdout", b"x")))
    for record in records:
        wire_event = to_wire_event("t", record)
        if wire_event is not None:
            streams.setdefault(wire_event["type"], set()).add(log_stream_of(wire_event))
    assert streams == {
        "output": {"stdout", "stderr"},
        "progress": {None},
        "metrics": {None},
        "state_change": {"events"},
        "attempt": {"events"},
        "agent_message": {"conversation"},
        "tool_call_started": {"conversation"},
        "tool_result": {"conversation"},
        "agent_result": {"conversation"},
        "tool_call": {"events"},
        "usage": {"events"},
        "egress_denied": {"events"},
        "gap": {"events"},
        "error": {"events"},
    }
    assert log_stream_of(end_event(timed_out_task())) is None
    assert set().union(*streams.values()) - {None} == set(get_args(LogStream)) - {"all"}


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_event_is_unchanged_by_journal_encoding_and_decoding(event):
    record = e.Record(7, 2, TIMESTAMP, event, e.Transition(TaskState.READY, TaskState.RUNNING, "x"))
    assert decode_record(encode_json(record)) == record


@pytest.mark.parametrize(
    "data", [b"", b"plain\n", "h\u00e4\u2028\n".encode(), b"\xff\x00\n", b"\xed\xa0\x80", bytes(range(256))]
)
def test_output_preserves_every_byte(data):
    event = msgspec.json.decode(msgspec.json.encode(e.Output.from_bytes("stdout", data)), type=e.Event)
    assert isinstance(event, e.Output)
    assert event.data == data
    assert event.display_text == data.decode(errors="replace")
    assert (event.text is None) != (event.base64 is None)


def test_unknown_event_type_is_rejected():
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"type": "party"}', type=e.Event)


def test_end_event_contains_the_outcome_and_an_unused_seq():
    assert end_event(timed_out_task()) == {
        "type": "end",
        "task_id": "t",
        "seq": 10,
        "timestamp": FORMATTED_TIMESTAMP,
        "state": "failed",
        "exit_code": 143,
        "error": {"code": "timeout", "reason": None, "message": "It took too long.", "remedy": None},
    }


def test_current_state_event_has_no_previous_state():
    wire_event = current_state_event(timed_out_task(state=TaskState.RUNNING, state_message="Claude Code is working"))
    assert (wire_event["previous_state"], wire_event["new_state"], wire_event["seq"]) == (None, "running", 9)
    assert log_stream_of(wire_event) == "events"
