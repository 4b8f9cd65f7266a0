"""What clients are shown of a record, and in which log stream it stands."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import msgspec
import pytest

from sandbox.model import events as e
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import Artifact
from sandbox.model.manifest.schema import Claude, Manifest, Metadata, Repository
from sandbox.model.task import StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import (
    LogStream,
    current_state_event,
    end_event,
    error_fields,
    format_timestamp,
    log_stream_of,
    to_wire_event,
)

AT = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
STAMP = "2026-01-29T10:10:15.123Z"
MANIFEST = Manifest(
    version="1",
    kind="Task",
    metadata=Metadata(name="x", labels={"team": "platform"}),
    repository=Repository(url="https://git.example/r", branch="main"),
    claude=Claude(prompt="x"),
)
FAILURE = Failure(FailureCode.TIMEOUT, "It took too long.")

ONE_OF_EACH: dict[type, tuple[e.Event, dict[str, Any] | None]] = {
    e.TaskSubmitted: (e.TaskSubmitted("t", MANIFEST), None),
    e.AttemptStarted: (
        e.AttemptStarted("abcdefgh2345", "bubblewrap", "here", number=2, resumes=True),
        {"type": "attempt", "attempt": 2, "attempt_id": "abcdefgh2345", "resumes": True},
    ),
    e.WorkspacePrepared: (e.WorkspacePrepared("0" * 40), None),
    e.SandboxCreated: (e.SandboxCreated("sandbox-x", "namespaces", "host"), None),
    e.AgentStarted: (e.AgentStarted("id"), None),
    e.Output: (
        e.Output.from_bytes("stderr", b"h\xc3\xa4\xff\n", continued=True),
        {"type": "output", "stream": "stderr", "data": "h\u00e4\ufffd\n", "bytes": 5, "continued": True},
    ),
    e.ToolCall: (
        e.ToolCall("Bash", "toolu_1", 12, True),
        {"type": "tool_call", "tool": "Bash", "tool_use_id": "toolu_1", "duration_ms": 12, "is_error": True},
    ),
    e.Usage: (
        e.Usage("m", 1, 2, 3, 4, 0.5),
        {"type": "usage", "model": "m", "input_tokens": 1, "output_tokens": 2, "cache_read_tokens": 3,
         "cache_write_tokens": 4, "cost_usd": 0.5},
    ),
    e.Progress: (
        e.Progress(1, 2, "Bash", AT, 3, 4, 5, 0.5, 6),
        {"type": "progress", "progress": {"output_bytes": 1, "tool_calls": 2, "current_tool": "Bash",
         "last_activity_at": STAMP, "turns": 3, "input_tokens": 4, "output_tokens": 5, "cost_usd": 0.5,
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
    e.AttemptEnded: (e.AttemptEnded(), None),
    e.RetrySkipped: (e.RetrySkipped(e.RetryKind.RETRY, "would not go"), None),
    e.AgentExited: (
        e.AgentExited(1, {"is_error": True}, FAILURE),
        {"type": "error", "error": "timeout", "message": "It took too long.", "details": None},
    ),
    e.ArtifactCollected: (e.ArtifactCollected(Artifact("a", "a", 1, "text/plain", "sha256:" + "0" * 64, True)), None),
    e.TaskFinished: (e.TaskFinished(), None),
}  # fmt: skip
EXAMPLES = [example for example, _ in ONE_OF_EACH.values()]


def test_there_is_an_example_of_every_kind_of_event():
    assert set(ONE_OF_EACH) == set(e.Event.__args__)


@pytest.mark.parametrize(("event", "fields"), ONE_OF_EACH.values(), ids=lambda value: type(value).__name__)
def test_every_event_is_shown_or_deliberately_hidden(event, fields):
    shown = to_wire_event("t", e.Record(7, 1, AT, event))
    wanted = None if fields is None else {"task_id": "t", "seq": 7, "timestamp": STAMP, **fields}
    assert shown == wanted


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_change_of_state_is_shown_whatever_caused_it(event):
    change = e.Transition(TaskState.READY, TaskState.RUNNING, "Claude Code is working")
    assert to_wire_event("t", e.Record(7, 1, AT, event, change)) == {
        "type": "state_change",
        "task_id": "t",
        "seq": 7,
        "timestamp": STAMP,
        "previous_state": "ready",
        "new_state": "running",
        "state_message": "Claude Code is working",
    }


def test_what_stdout_is_rendered_from_is_shown_to_nobody():
    assert to_wire_event("t", e.Record(7, 1, AT, e.Output.from_bytes("transcript", b"{}\n"))) is None


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_frames_are_json(event):
    shown = to_wire_event("t", e.Record(7, 1, AT, event))
    assert msgspec.json.decode(msgspec.json.encode(shown)) == shown


def test_each_kind_of_frame_is_in_one_log_stream_or_in_none():
    streams: dict[str, set[str | None]] = {}
    change = e.Transition(None, TaskState.PENDING, "Waiting")
    records = [e.Record(1, 1, AT, event) for event in EXAMPLES] + [e.Record(1, 1, AT, EXAMPLES[0], change)]
    records.append(e.Record(1, 1, AT, e.Output.from_bytes("stdout", b"x")))
    for record in records:
        shown = to_wire_event("t", record)
        if shown is not None:
            streams.setdefault(shown["type"], set()).add(log_stream_of(shown))
    assert streams == {
        "output": {"stdout", "stderr"},
        "progress": {None},
        "metrics": {None},
        "state_change": {"events"},
        "attempt": {"events"},
        "tool_call": {"events"},
        "usage": {"events"},
        "egress_denied": {"events"},
        "gap": {"events"},
        "error": {"events"},
    }
    assert set().union(*streams.values()) - {None} == set(get_args(LogStream)) - {"all"}


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_event_survives_the_journal(event):
    record = e.Record(7, 2, AT, event, e.Transition(TaskState.READY, TaskState.RUNNING, "x"))
    assert msgspec.json.decode(msgspec.json.encode(record), type=e.Record) == record


@pytest.mark.parametrize(
    "data", [b"", b"plain\n", "h\u00e4\u2028\n".encode(), b"\xff\x00\n", b"\xed\xa0\x80", bytes(range(256))]
)
def test_output_keeps_every_byte(data):
    event = msgspec.json.decode(msgspec.json.encode(e.Output.from_bytes("stdout", data)), type=e.Event)
    assert isinstance(event, e.Output)
    assert event.data == data
    assert event.display_text == data.decode(errors="replace")
    assert (event.text is None) != (event.base64 is None)


def test_an_event_of_a_type_that_nobody_knows_is_refused():
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"type": "party"}', type=e.Event)


def test_times_are_utc_with_milliseconds():
    assert format_timestamp(AT.astimezone(timezone(timedelta(hours=5, minutes=30)))) == STAMP
    assert format_timestamp(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01T00:00:00.000Z"


def task(**changes: Any) -> Task:
    history = (StateHistoryEntry(TaskState.PENDING, AT), StateHistoryEntry(TaskState.FAILED, AT))
    fields: dict[str, Any] = {"state": TaskState.FAILED, "state_message": "x", "failure": FAILURE, "exit_code": 143}
    return Task(id="t", manifest=MANIFEST, history=history, last_seq=9, **fields | changes)


def test_the_last_frame_says_how_it_ended_with_a_number_no_record_has():
    assert end_event(task()) == {
        "type": "end",
        "task_id": "t",
        "seq": 10,
        "timestamp": STAMP,
        "state": "failed",
        "exit_code": 143,
        "error": {"code": "timeout", "message": "It took too long."},
    }


def test_a_cancelled_task_has_no_error():
    assert error_fields(task(cancel=e.CancelRequested())) is None
    assert error_fields(task(failure=None)) is None


def test_a_client_that_begins_now_hears_the_present_state_first():
    shown = current_state_event(task(state=TaskState.RUNNING, state_message="Claude Code is working"))
    assert (shown["previous_state"], shown["new_state"], shown["seq"]) == (None, "running", 9)
    assert log_stream_of(shown) == "events"
