"""What a client makes of the bytes of an event stream."""

import json
import typing
from datetime import UTC, datetime

import pytest

from sandbox.api.streaming.websocket import EVENT_TYPES
from sandbox.client import Event, UnexpectedAnswerError
from sandbox.client.sse import SseParser, parse_event
from sandbox.model import events as e
from sandbox.model.wire.events import to_wire_event


def event(seq: int, **fields) -> bytes:
    data = json.dumps({"type": "output", "seq": seq, **fields}, ensure_ascii=False)
    return f"id: {seq}\nevent: output\ndata: {data}\n\n".encode()


def read(*chunks: bytes) -> list[dict]:
    stream = SseParser()
    return [event for chunk in chunks for event in stream.feed(chunk)]


def test_events_come_out_in_order_and_keep_alive_comments_do_not():
    assert [frame["seq"] for frame in read(event(1), b": keep-alive\n\n", event(2))] == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_where_the_network_cuts_the_bytes_does_not_matter(size):
    whole = event(1, data="grün 日本\n") + event(2, data="x")
    chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert [frame["data"] for frame in read(*chunks)] == ["grün 日本\n", "x"]


def test_a_line_separator_inside_output_is_not_the_end_of_a_line():
    text = "one\u2028two\u0085three\x0bfour"
    assert read(event(1, data=text))[0]["data"] == text


def test_carriage_returns_before_line_feeds_are_part_of_the_line_ends():
    assert read(event(1).replace(b"\n", b"\r\n"))[0]["seq"] == 1


def test_an_event_that_was_cut_off_is_left_out():
    assert [frame["seq"] for frame in read(event(1), event(2)[:-1])] == [1]


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
        "[" * 100_000,
    ],
)
def test_an_event_that_is_not_one_of_ours_is_refused(data):
    with pytest.raises(UnexpectedAnswerError):
        read(f"data: {data}\n\n".encode())


def test_an_event_without_an_end_is_given_up_before_it_fills_the_memory():
    with pytest.raises(UnexpectedAnswerError, match="too large"):
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
        e.ToolCall("Bash", "t1", 25),
        e.Output.from_bytes("stdout", b"x\n"),
    ],
)
def test_what_the_server_tells_is_taken(event):
    sent = to_wire_event("task-1", e.Record(7, 1, datetime(2026, 1, 2, tzinfo=UTC), event))
    assert parse_event(json.dumps(sent).encode())["seq"] == 7


def test_whoever_matches_events_by_their_type_finds_each_that_a_server_sends():
    hints = [typing.get_type_hints(kind)["type"] for kind in typing.get_args(Event)]
    assert {typing.get_args(hint)[0] for hint in hints} == {*EVENT_TYPES, "usage"}


def test_an_event_of_too_many_lines_is_refused_and_many_events_are_not():
    with pytest.raises(UnexpectedAnswerError, match="too large"):
        read(*[b"data: " + b"x" * 65_000 + b"\n"] * 300)
    assert len(read(*[event(number, data="x" * 65_000) for number in range(300)])) == 300
