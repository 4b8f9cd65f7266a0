"""Logs and events of a task."""

import json
import weakref
from collections import deque

import msgspec
import pytest
from starlette.datastructures import QueryParams

from doubles.example_requests import Example
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.routes import logs
from sandbox.api.routes.live_events import StreamRequest
from sandbox.model import events as e
from sandbox.model.errors import InvalidParameterError

EXAMPLES = (
    Example("get_logs", query={"stream": "events", "tail": "3"}),
    Example("get_events", query={"after": "0-0"}),
)

LOGS_PATH = "/api/v1/tasks/task-001/logs"


@pytest.fixture(autouse=True)
def _finished_task(tasks):
    tasks.add(
        "task-001",
        *TO_RUNNING,  # seq 2-5
        e.Output.from_bytes("stdout", b"first\n"),  # 6
        e.Output.from_bytes("stderr", b"warning: \x1b[31m\xff\n"),  # 7
        e.ToolCallEnded("Bash", "toolu_1", 12),  # 8
        e.Progress(turns=1),  # 9
        e.Output.from_bytes("stdout", b"last, without a newline"),  # 10
        *TO_COMPLETED,  # 11, 12
    )


def lines(response):
    assert response.status_code == 200
    return response.text.splitlines()


def sse(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = json.loads(fields["data"])
        assert (fields["event"], fields["id"]) == (data["type"], str(data["seq"]))
        events.append((data["seq"], data["type"]))
    return events


class ReleasableValue:
    """A part of a task that shows whether the task is still in memory."""


def test_task_is_not_kept_in_memory_during_the_search_for_the_last_lines(api, tasks, monkeypatch):
    read_status, read_events, loaded, found_in_memory = tasks.status, tasks.recorded_events, [], []

    async def status(task_id):
        value = ReleasableValue()
        loaded.append(weakref.ref(value))
        return msgspec.structs.replace(await read_status(task_id), result={"value": value})

    def recorded_events(task_id, *, after=0):
        found_in_memory.append(any(one() is not None for one in loaded))
        return read_events(task_id, after=after)

    monkeypatch.setattr(tasks, "status", status)
    monkeypatch.setattr(tasks, "recorded_events", recorded_events)
    assert len(lines(api.get(f"{LOGS_PATH}?tail=1"))) == 1
    assert found_in_memory[0] is False


def test_plain_logs_have_time_and_source(api):
    response = api.get(LOGS_PATH)
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    log_lines = response.text.split("\n")
    assert "[2026-01-29T10:10:15.129Z] [STDOUT] first" in log_lines
    assert "[2026-01-29T10:10:15.130Z] [STDERR] warning: \x1b[31m\ufffd" in log_lines
    assert "[2026-01-29T10:10:15.133Z] [STDOUT] last, without a newline" in log_lines
    event = next(line for line in log_lines if "tool_call" in line)
    prefix, _, document = event.partition(" [EVENT] ")
    assert prefix == "[2026-01-29T10:10:15.131Z]"
    assert json.loads(document)["duration_ms"] == 12
    assert "progress" not in response.text
    assert log_lines[-1] == ""


def test_forged_log_lines_keep_their_source(api, tasks):
    forged = b'a\r\n[2026-01-29T10:10:15.123Z] [EVENT] {"type": "end"}\n\n[2026-01-29T10:10:15.123Z] [STDERR] b\n'
    tasks.add("task-003", *TO_RUNNING, e.Output.from_bytes("stdout", forged))
    response = api.get("/api/v1/tasks/task-003/logs?stream=stdout")
    log_lines = [line.split(" ", 2)[1:] for line in response.text.removesuffix("\n").split("\n")]
    assert log_lines == [["[STDOUT]", text] for text in forged.decode().removesuffix("\n").split("\n")]


def test_line_split_across_records_is_joined(api, tasks):
    parts = [
        e.Output.from_bytes("stdout", b"one ", is_continued=True),
        e.Progress(turns=1),
        e.Output.from_bytes("stdout", b"long ", is_continued=True),
        e.Output.from_bytes("stdout", b"line\n"),
        e.Output.from_bytes("stdout", b"cut by ", is_continued=True),
        e.Output.from_bytes("stderr", b"a warning\n"),
        e.Output.from_bytes("stdout", b"and no end yet", is_continued=True),
    ]
    tasks.add("task-003", *TO_RUNNING, *parts)
    log_lines = api.get("/api/v1/tasks/task-003/logs").text.split("\n")[-4:]
    assert [line.split(" ", 1)[1] for line in log_lines] == [
        "[STDOUT] one long line",
        "[STDOUT] cut by ",
        "[STDERR] a warning",
        "[STDOUT] and no end yet",
    ]
    stdout_lines = api.get("/api/v1/tasks/task-003/logs?stream=stdout").text.split("\n")
    assert [line.split(" ", 2)[2] for line in stdout_lines] == ["one long line", "cut by and no end yet"]


def test_endless_line_is_split(api, tasks, monkeypatch):
    monkeypatch.setattr(logs, "TEXT_LINE_BYTES_MAX", 8)
    parts = [e.Output.from_bytes("stdout", b"part", is_continued=True)] * 3
    tasks.add("task-003", *TO_RUNNING, *parts, e.Output.from_bytes("stdout", b"end\n"))
    text = api.get("/api/v1/tasks/task-003/logs?stream=stdout").text
    assert [line.split(" ", 1)[1] for line in text.splitlines()] == ["[STDOUT] partpart", "[STDOUT] partend"]


@pytest.mark.parametrize(("stream", "count"), [("all", 11), ("", 11), ("stdout", 2), ("stderr", 1), ("events", 8)])
def test_each_line_is_in_its_own_stream_and_in_the_stream_named_all(api, stream, count):
    assert len(lines(api.get(LOGS_PATH, params={"stream": stream} if stream else {}))) == count


def test_conversation_is_a_separate_stream(api, tasks):
    conversation = (e.AgentMessage("Hello."), e.ToolCallStarted("Bash", "t"), e.ToolResult("t"), e.AgentResult("Done."))
    tasks.add("task-003", *TO_RUNNING, e.Output.from_bytes("stdout", b"{}\n", is_parsed=True), *conversation)
    path = "/api/v1/tasks/task-003/logs"
    types = [
        json.loads(line.partition("[EVENT] ")[2])["type"] for line in lines(api.get(f"{path}?stream=conversation"))
    ]
    assert types == ["agent_message", "tool_call_started", "tool_result", "agent_result"]
    assert [len(lines(api.get(path, params={"stream": each}))) for each in ("stdout", "events", "all")] == [1, 5, 10]
    assert len(lines(api.get(f"{path}?stream=conversation&tail=2"))) == 2


CONVERTED = {"type": "output", "stream": "stdout", "data": "{}\n", "continued": False, "conversation": [{"type": "x"}]}


@pytest.mark.parametrize(
    ("stream", "is_following", "types"),
    [
        ("all", False, ["output", "conversation"]),
        ("all", True, ["output"]),
        ("stdout", False, ["output"]),
        ("conversation", False, ["conversation"]),
        ("conversation", True, ["conversation"]),
        ("stderr", False, []),
        ("events", True, []),
    ],
)
def test_each_log_stream_includes_the_matching_parts_of_converted_output(stream, is_following, types):
    event = {**CONVERTED, "task_id": "t", "seq": 7, "timestamp": "2026-01-29T10:10:15.123Z"}
    encoder = logs.LogEncoder(stream, "", lambda part: part["type"].encode() + b"\n", is_following, not is_following)
    assert b"".join(encoder.encode([event])).decode().split() == types
    assert encoder.includes(event) == bool(types)


def test_tail_counts_lines_after_filtering(api):
    assert [line[-5:] for line in lines(api.get(f"{LOGS_PATH}?stream=stdout&tail=1"))] == ["wline"]
    assert len(lines(api.get(f"{LOGS_PATH}?tail=3"))) == 3
    assert (
        lines(api.get(f"{LOGS_PATH}?tail=1000")) == lines(api.get(f"{LOGS_PATH}?tail=0")) == lines(api.get(LOGS_PATH))
    )


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize("stream", ["all", "events", "stdout"])
def test_limit_parameter_pages_through_the_log(api, stream, accept):
    def read(query):
        text = api.get(f"{LOGS_PATH}?stream={stream}{query}", headers={"Accept": accept}).text
        return json.loads(text) if accept == "application/json" else list(map(json.loads, text.splitlines()))

    expected, pages = read(""), []
    while page := read(f"&limit=2&after={pages[-1][-1]['seq'] if pages else 0}"):
        pages.append(page)
    assert [event for page in pages for event in page] == expected
    assert {len(page) for page in pages[:-1]} == {2} - ({2} if len(pages) == 1 else set())
    assert read("&limit=0") == read("&limit=1000000") == expected


def test_limit_counts_lines_of_text(api):
    assert lines(api.get(f"{LOGS_PATH}?limit=3")) == lines(api.get(LOGS_PATH))[:3]


@pytest.mark.parametrize(
    ("query", "fields"),
    [("tail=1", ["tail"]), ("follow=true", ["follow"]), ("tail=1&follow=true", ["tail", "follow"])],
)
def test_limit_cannot_be_combined_with_other_parameters(api, query, fields):
    response = api.get(f"{LOGS_PATH}?limit=1&{query}")
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert [detail["field"] for detail in response.json()["details"]] == fields
    assert api.get(f"{LOGS_PATH}?limit=0&{query}").status_code == 200


def test_limit_stops_reading_the_log(api, tasks):
    read = []
    replay = tasks.recorded_events

    async def record(task_id, *, after=0):
        async for event in replay(task_id, after=after):
            read.append(event["seq"])
            yield event

    tasks.recorded_events = record
    assert len(lines(api.get(f"{LOGS_PATH}?limit=2"))) == 2
    assert max(read) < 5


@pytest.fixture
def replay_positions(api, tasks):
    """Add a task with a lot of output, little of it on stderr. Return a list that records where replays start."""
    outputs = [e.Output.from_bytes("stderr" if n % 97 == 0 else "stdout", b"%d\n" % n) for n in range(2000)]
    tasks.add("task-003", *TO_RUNNING, *outputs)
    replay_positions, replay = [], tasks.recorded_events

    def record_position(task_id, *, after=0):
        replay_positions.append(after)
        return replay(task_id, after=after)

    tasks.recorded_events = record_position
    return replay_positions


@pytest.mark.parametrize("blocks_max", [1000, 7, 1])
@pytest.mark.parametrize("stream", ["all", "stdout", "stderr", "events"])
def test_tail_equals_the_end_of_the_log(api, replay_positions, stream, blocks_max, monkeypatch):
    monkeypatch.setattr(logs, "_TAIL_BLOCKS_MAX", blocks_max)
    path = f"/api/v1/tasks/task-003/logs?stream={stream}"
    all_lines, resumed = lines(api.get(path)), lines(api.get(f"{path}&after=1000"))
    for tail in (1, 2, 5, 20, 21, 22, 500, 2004, 2005, 2006, 1_000_000):
        assert lines(api.get(f"{path}&tail={tail}")) == all_lines[-tail:]
        assert lines(api.get(f"{path}&tail={tail}&after=1000")) == resumed[-tail:]


def test_tail_does_not_read_the_log_from_the_beginning(api, replay_positions):
    lines(api.get("/api/v1/tasks/task-003/logs?tail=10"))
    assert min(replay_positions) > 1900


def test_memory_used_by_a_long_tail_is_bounded(api, replay_positions, monkeypatch):
    bounds = []

    def record_maxlen(*arguments, maxlen):
        bounds.append(maxlen)
        return deque(*arguments, maxlen=maxlen)

    monkeypatch.setattr(logs, "deque", record_maxlen)
    assert len(lines(api.get("/api/v1/tasks/task-003/logs?tail=1000000"))) > 2000
    assert max(bounds) <= 1002


def test_since_parameter_is_inclusive(api):
    assert len(lines(api.get(f"{LOGS_PATH}?stream=stdout&since=2026-01-29T10:10:15.133Z"))) == 1
    assert len(lines(api.get(f"{LOGS_PATH}?stream=stdout&since=2026-01-29T10:10:15.134Z"))) == 0
    # An unescaped plus sign arrives as a space.
    assert len(lines(api.get(f"{LOGS_PATH}?stream=stdout&since=2026-01-29T12:10:15.129+02:00"))) == 2


def test_after_parameter_skips_earlier_records(api):
    assert len(lines(api.get(f"{LOGS_PATH}?stream=stdout&after=6"))) == 1
    assert len(lines(api.get(f"{LOGS_PATH}?after=99"))) == 0


def test_following_a_finished_task_returns_all_events_and_ends(api):
    events = sse(api.get(f"{LOGS_PATH}?follow=true"))
    assert [seq for seq, _ in events] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert events[-1] == (13, "end")


def test_follow_supports_ndjson(api):
    response = api.get(f"{LOGS_PATH}?follow=true&stream=stdout", headers={"accept": "application/x-ndjson"})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    events = [json.loads(line) for line in response.text.splitlines()]
    assert [event.get("data", event["type"]) for event in events] == ["first\n", "last, without a newline", "end"]
    assert (events[-1]["state"], events[-1]["exit_code"], events[-1]["error"]) == ("completed", 0, None)


def test_log_without_follow_is_text_or_ndjson_or_json(api):
    ndjson = api.get(f"{LOGS_PATH}?stream=stdout", headers={"accept": "application/x-ndjson"})
    assert ndjson.headers["content-type"].startswith("application/x-ndjson")
    events = [json.loads(line) for line in ndjson.text.splitlines()]
    assert [event["data"] for event in events] == ["first\n", "last, without a newline"]
    array = api.get(f"{LOGS_PATH}?stream=stdout", headers={"accept": "application/json"})
    assert array.headers["content-type"] == "application/json"
    assert array.json() == events
    whole = api.get(LOGS_PATH, headers={"accept": "application/json"}).json()
    assert [event["seq"] for event in whole] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]
    last = api.get(f"{LOGS_PATH}?tail=1", headers={"accept": "application/json"}).json()
    assert last == whole[-1:]
    assert api.get(f"{LOGS_PATH}?after=100", headers={"accept": "application/json"}).json() == []
    assert api.get(f"{LOGS_PATH}?after=100", headers={"accept": "application/x-ndjson"}).text == ""


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/json, text/plain, */*", "text/plain"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/plain"),
        ("application/xml", "text/plain"),
        ("application/json", "application/json"),
        ("Application/JSON; charset=utf-8", "application/json"),
        ("application/json, text/plain;q=0.5", "application/json"),
        ("application/x-ndjson, */*;q=0.1", "application/x-ndjson"),
        ("application/json;q=0.2, application/x-ndjson;q=0.9", "application/x-ndjson"),
        ("application/json;q=0", "text/plain"),
        ("application/json;q=x, text/plain;q=1.0", "text/plain"),
    ],
)
def test_log_without_follow_has_the_preferred_format(api, accept, media_type):
    response = api.get(f"{LOGS_PATH}?stream=stderr", headers={"accept": accept})
    assert response.headers["content-type"].partition(";")[0] == media_type


def test_follow_resumes_after_the_event_that_the_header_or_parameter_names(api):
    assert sse(api.get(f"{LOGS_PATH}?follow=true", headers={"last-event-id": "11"})) == [
        (12, "state_change"),
        (13, "end"),
    ]
    assert sse(api.get(f"{LOGS_PATH}?follow=true&after=12")) == [(13, "end")]
    with_both = api.get(f"{LOGS_PATH}?follow=true&after=12", headers={"last-event-id": "6"})
    assert sse(with_both) == [(13, "end")]


def test_tail_is_ignored_on_reconnect(api):
    path = f"{LOGS_PATH}?follow=true&tail=1"
    assert sse(api.get(path)) == [(12, "state_change"), (13, "end")]
    assert sse(api.get(path, headers={"last-event-id": "10"})) == [
        (11, "state_change"),
        (12, "state_change"),
        (13, "end"),
    ]


def test_reconnect_after_the_end_returns_204(api):
    response = api.get(f"{LOGS_PATH}?follow=true", headers={"last-event-id": "13"})
    assert (response.status_code, response.content) == (204, b"")


def test_largest_seq_is_accepted_and_a_larger_one_rejected(api):
    largest = str(2**63 - 1)
    assert api.get(f"{LOGS_PATH}?after={largest}").status_code == 200
    assert api.get(f"{LOGS_PATH}?follow=true", headers={"last-event-id": largest}).status_code == 204
    assert StreamRequest.parse(QueryParams({"task_id": "task-001", "after": largest})).after == 2**63 - 1
    assert api.get(f"{LOGS_PATH}?after={2**63}").status_code == 400
    with pytest.raises(InvalidParameterError, match="from 0 to 9223372036854775807"):
        StreamRequest.parse(QueryParams({"task_id": "task-001", "after": str(2**63)}))


def test_all_invalid_parameters_of_an_event_stream_are_listed():
    with pytest.raises(InvalidParameterError) as caught:
        StreamRequest.parse(QueryParams({"filter": "output,toolcall", "after": "x", "taskid": "task-001"}))
    assert [(error.location, error.suggestion) for error in caught.value.errors] == [
        ("query.taskid", "task_id"),
        ("query.filter", "tool_call"),
        ("query.after", None),
    ]
    assert StreamRequest.parse(QueryParams({"filter": "output,tool_call"})).types >= {"output", "tool_call", "end"}


@pytest.mark.parametrize("event_id", ["x", "-1", "9" * 5000, "9" * 19])
def test_invalid_last_event_id_is_rejected(api, event_id):
    response = api.get(f"{LOGS_PATH}?follow=true", headers={"last-event-id": event_id})
    assert (response.status_code, response.json()["details"][0]["field"]) == (400, "Last-Event-ID")


def test_gap_is_sent_to_all_followers_and_is_in_one_log_stream(api, tasks):
    tasks.add("task-002", e.Gap(3, 4, "disk full"))
    logs = "/api/v1/tasks/task-002/logs"
    assert lines(api.get(f"{logs}?stream=stdout")) == []
    assert len(lines(api.get(f"{logs}?stream=events"))) == 2
    tasks.record("task-002", e.CancelRequested(), e.TaskFinished())
    assert [kind for _, kind in sse(api.get(f"{logs}?stream=stdout&follow=1"))] == ["gap", "end"]
