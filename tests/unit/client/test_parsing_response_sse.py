"""Parsing of an event stream."""

import json
from datetime import UTC, datetime

import pytest

from sandbox.client import UnexpectedResponseError
from sandbox.client.parsing import EVENT_BYTES_MAX, LINE_BYTES_MAX, LineBuffer, SseParser, parse_event
from sandbox.model import events as e
from sandbox.model.wire.event_conversion import to_wire_event


def make_event(seq: int, **fields) -> bytes:
    data = json.dumps({"type": "output", "seq": seq, **fields}, ensure_ascii=False)
    return f"id: {seq}\nevent: output\ndata: {data}\n\n".encode()


def read(*chunks: bytes) -> list[dict]:
    parser = SseParser()
    return [parsed for chunk in chunks for parsed in parser.feed(chunk)]


def test_events_are_parsed_in_order_without_comments():
    assert [parsed["seq"] for parsed in read(make_event(1), b": keep-alive\n\n", make_event(2))] == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_events_do_not_depend_on_chunk_boundaries(size):
    whole = make_event(1, data="grün 日本\n") + make_event(2, data="x")
    chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert [parsed["data"] for parsed in read(*chunks)] == ["grün 日本\n", "x"]


def test_unicode_line_separators_do_not_end_lines():
    text = "one\u2028two\u0085three\x0bfour"
    assert read(make_event(1, data=text))[0]["data"] == text


def test_crlf_line_endings_are_accepted():
    assert read(make_event(1).replace(b"\n", b"\r\n"))[0]["seq"] == 1


def test_incomplete_event_is_not_returned():
    assert [parsed["seq"] for parsed in read(make_event(1), make_event(2)[:-1])] == [1]


@pytest.mark.parametrize(
    "data",
    [
        "nonsense",
        "[]",
        '{"type": "output"}',
        '{"type": 1, "seq": 1}',
        '{"type": "output", "seq": "1"}',
        '{"type": "brand_new", "seq": null}',
        '{"type": "tool_call", "seq": 1, "duration_ms": "long"}',
        '{"type": "usage", "seq": 1, "cost_usd": 1e999}',
        '{"type": "output", "seq": 1, "conversation": [5]}',
        '{"type": "output", "seq": 1, "conversation": [{"type": "agent_message", "text": 5}]}',
        "[" * 100_000,
    ],
)
def test_invalid_event_is_rejected(data):
    with pytest.raises(UnexpectedResponseError):
        read(f"data: {data}\n\n".encode())


def test_endless_event_is_rejected():
    with pytest.raises(UnexpectedResponseError, match="too large"):
        read(*[b"x" * 1024 * 1024] * 17)


@pytest.mark.parametrize(
    "event",
    [
        e.Usage("a-model-without-a-price", 1, 2, 3, 4, cost_usd=None),
        e.Usage("m", 1, 2, 3, 4, cost_usd=0.5),
        e.Metrics(),
        e.Metrics(cpu_percent=1.5, memory_used_bytes=1, disk_used_bytes=2, load_avg=0.5),
        e.ErrorReported("upstream_unreachable", "no"),
        e.EgressDenied("host", 443, "no"),
        e.ToolCallEnded("Bash", "t1", 25),
        e.Output.from_bytes("stdout", b"x\n"),
    ],
)
def test_server_events_are_accepted(event):
    sent = to_wire_event("task-1", e.Record(7, 1, datetime(2026, 1, 2, tzinfo=UTC), event))
    assert parse_event(json.dumps(sent).encode())["seq"] == 7


@pytest.mark.parametrize(
    "data",
    [
        '{"type": "brand_new", "seq": 1, "data": 5}',
        '{"type": "output", "seq": 1, "stream": "brand_new", "brand_new": 5}',
        '{"type": "output", "seq": 1, "conversation": [{"type": "brand_new", "text": 5}, {"text": 5}]}',
        '{"type": "conversation", "seq": 1, "conversation": [{"type": "agent_message", "kind": "brand_new"}]}',
    ],
)
def test_events_from_a_newer_server_are_accepted(data):
    assert parse_event(data.encode()) == json.loads(data)


def test_event_with_too_many_lines_is_rejected():
    with pytest.raises(UnexpectedResponseError, match="too large"):
        read(*[b"data: " + b"x" * 65_000 + b"\n"] * 300)
    assert len(read(*[make_event(number, data="x" * 65_000) for number in range(300)])) == 300


def test_overlong_log_line_is_rejected():
    chunk = bytes(1024 * 1024)
    lines = LineBuffer()
    for _ in range(EVENT_BYTES_MAX // len(chunk)):
        assert lines.feed(chunk) == []
    assert len(lines.feed(b"\n")[0]) == EVENT_BYTES_MAX + 1
    for _ in range(LINE_BYTES_MAX // len(chunk)):
        assert lines.feed(chunk) == []
    with pytest.raises(UnexpectedResponseError, match="too long"):
        lines.feed(chunk)
