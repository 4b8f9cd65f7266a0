"""Somebody reads what a task printed and what happened to it."""

import json
from collections import deque

import pytest
from starlette.datastructures import QueryParams

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.errors import InvalidParameterError
from sandbox.api.routes import logs
from sandbox.api.streaming.websocket import StreamRequest
from sandbox.model import events as e

LOGS = "/api/v1/tasks/task-001/logs"


@pytest.fixture(autouse=True)
def _finished(tasks):
    tasks.add(
        "task-001",
        *TO_RUNNING,  # seq 2-5
        e.Output.from_bytes("stdout", b"first\n"),  # 6
        e.Output.from_bytes("stderr", b"warning: \x1b[31m\xff\n"),  # 7
        e.ToolCall("Bash", "toolu_1", 12),  # 8
        e.Progress(turns=1),  # 9
        e.Output.from_bytes("stdout", b"last, without a newline"),  # 10
        *TO_COMPLETED,  # 11, 12
    )


def lines(answer):
    assert answer.status_code == 200
    return answer.text.splitlines()


def sse(answer):
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = json.loads(fields["data"])
        assert (fields["event"], fields["id"]) == (data["type"], str(data["seq"]))
        events.append((data["seq"], data["type"]))
    return events


def test_plain_logs_are_lines_with_time_and_source(api):
    answer = api.get(LOGS)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    told = answer.text.split("\n")
    assert "[2026-01-29T10:10:15.129Z] [STDOUT] first" in told
    assert "[2026-01-29T10:10:15.130Z] [STDERR] warning: \x1b[31m\ufffd" in told
    assert "[2026-01-29T10:10:15.133Z] [STDOUT] last, without a newline" in told
    event = next(line for line in told if "tool_call" in line)
    prefix, _, document = event.partition(" [EVENT] ")
    assert prefix == "[2026-01-29T10:10:15.131Z]"
    assert json.loads(document)["duration_ms"] == 12
    assert "progress" not in answer.text
    assert told[-1] == ""


def test_output_of_several_lines_passes_for_nothing_else(api, tasks):
    forged = b'a\r\n[2026-01-29T10:10:15.123Z] [EVENT] {"type": "end"}\n\n[2026-01-29T10:10:15.123Z] [STDERR] b\n'
    tasks.add("task-003", *TO_RUNNING, e.Output.from_bytes("stdout", forged))
    answer = api.get("/api/v1/tasks/task-003/logs?stream=stdout")
    told = [line.split(" ", 2)[1:] for line in answer.text.removesuffix("\n").split("\n")]
    assert told == [["[STDOUT]", text] for text in forged.decode().removesuffix("\n").split("\n")]


def test_a_line_that_was_too_long_for_one_record_is_one_line(api, tasks):
    parts = [
        e.Output.from_bytes("stdout", b"one ", continued=True),
        e.Progress(turns=1),
        e.Output.from_bytes("stdout", b"long ", continued=True),
        e.Output.from_bytes("stdout", b"line\n"),
        e.Output.from_bytes("stdout", b"cut by ", continued=True),
        e.Output.from_bytes("stderr", b"a warning\n"),
        e.Output.from_bytes("stdout", b"and no end yet", continued=True),
    ]
    tasks.add("task-003", *TO_RUNNING, *parts)
    told = api.get("/api/v1/tasks/task-003/logs").text.split("\n")[-4:]
    assert [line.split(" ", 1)[1] for line in told] == [
        "[STDOUT] one long line",
        "[STDOUT] cut by ",
        "[STDERR] a warning",
        "[STDOUT] and no end yet",
    ]
    alone = api.get("/api/v1/tasks/task-003/logs?stream=stdout").text.split("\n")
    assert [line.split(" ", 2)[2] for line in alone] == ["one long line", "cut by and no end yet"]


def test_a_line_without_an_end_is_cut_before_it_takes_all_memory_of_who_reads_it(api, tasks, monkeypatch):
    monkeypatch.setattr(logs, "TEXT_LINE_BYTES_MAX", 8)
    parts = [e.Output.from_bytes("stdout", b"part", continued=True)] * 3
    tasks.add("task-003", *TO_RUNNING, *parts, e.Output.from_bytes("stdout", b"end\n"))
    told = api.get("/api/v1/tasks/task-003/logs?stream=stdout").text
    assert [line.split(" ", 1)[1] for line in told.splitlines()] == ["[STDOUT] partpart", "[STDOUT] partend"]


@pytest.mark.parametrize(("stream", "count"), [("all", 11), ("", 11), ("stdout", 2), ("stderr", 1), ("events", 8)])
def test_each_line_is_in_one_stream_and_in_all(api, stream, count):
    assert len(lines(api.get(LOGS, params={"stream": stream} if stream else {}))) == count


def test_tail_counts_lines_after_filtering(api):
    assert [line[-5:] for line in lines(api.get(f"{LOGS}?stream=stdout&tail=1"))] == ["wline"]
    assert len(lines(api.get(f"{LOGS}?tail=3"))) == 3
    assert lines(api.get(f"{LOGS}?tail=1000")) == lines(api.get(f"{LOGS}?tail=0")) == lines(api.get(LOGS))


@pytest.fixture
def long_story(api, tasks):
    """A task that printed a lot, little of it to stderr; gives its lines of stderr, and what was read to answer."""
    outputs = [e.Output.from_bytes("stderr" if n % 97 == 0 else "stdout", b"%d\n" % n) for n in range(2000)]
    tasks.add("task-003", *TO_RUNNING, *outputs)
    begun_at, replay = [], tasks.replay

    def watched(task_id, *, after=0):
        begun_at.append(after)
        return replay(task_id, after=after)

    tasks.replay = watched
    return begun_at


@pytest.mark.parametrize("blocks_max", [1000, 7, 1])
@pytest.mark.parametrize("stream", ["all", "stdout", "stderr", "events"])
def test_a_tail_is_the_end_of_the_whole(api, long_story, stream, blocks_max, monkeypatch):
    monkeypatch.setattr(logs, "_TAIL_BLOCKS_MAX", blocks_max)
    path = f"/api/v1/tasks/task-003/logs?stream={stream}"
    whole, resumed = lines(api.get(path)), lines(api.get(f"{path}&after=1000"))
    for tail in (1, 2, 5, 20, 21, 22, 500, 2004, 2005, 2006, 1_000_000):
        assert lines(api.get(f"{path}&tail={tail}")) == whole[-tail:]
        assert lines(api.get(f"{path}&tail={tail}&after=1000")) == resumed[-tail:]


def test_the_end_of_a_long_story_is_not_looked_for_from_its_beginning(api, long_story):
    lines(api.get("/api/v1/tasks/task-003/logs?tail=10"))
    assert min(long_story) > 1900


def test_few_numbers_are_remembered_for_a_long_tail(api, long_story, monkeypatch):
    bounds = []

    def watched(*arguments, maxlen):
        bounds.append(maxlen)
        return deque(*arguments, maxlen=maxlen)

    monkeypatch.setattr(logs, "deque", watched)
    assert len(lines(api.get("/api/v1/tasks/task-003/logs?tail=1000000"))) > 2000
    assert max(bounds) <= 1002


def test_since_is_inclusive(api):
    assert len(lines(api.get(f"{LOGS}?stream=stdout&since=2026-01-29T10:10:15.133Z"))) == 1
    assert len(lines(api.get(f"{LOGS}?stream=stdout&since=2026-01-29T10:10:15.134Z"))) == 0
    # A plus sign that nobody escaped arrives as a space.
    assert len(lines(api.get(f"{LOGS}?stream=stdout&since=2026-01-29T12:10:15.129+02:00"))) == 2


def test_after_leaves_out_what_was_seen(api):
    assert len(lines(api.get(f"{LOGS}?stream=stdout&after=6"))) == 1
    assert len(lines(api.get(f"{LOGS}?after=99"))) == 0


def test_following_a_finished_task_tells_its_whole_story_and_ends(api):
    events = sse(api.get(f"{LOGS}?follow=true"))
    assert [seq for seq, _ in events] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert events[-1] == (13, "end")


def test_a_follower_can_read_lines_of_json(api):
    answer = api.get(f"{LOGS}?follow=true&stream=stdout", headers={"accept": "application/x-ndjson"})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    told = [json.loads(line) for line in answer.text.splitlines()]
    assert [frame.get("data", frame["type"]) for frame in told] == ["first\n", "last, without a newline", "end"]
    assert (told[-1]["state"], told[-1]["exit_code"], told[-1]["error"]) == ("completed", 0, None)


def test_a_follower_goes_on_where_it_left_off(api):
    assert sse(api.get(f"{LOGS}?follow=true", headers={"last-event-id": "11"})) == [(12, "state_change"), (13, "end")]
    assert sse(api.get(f"{LOGS}?follow=true&after=12")) == [(13, "end")]
    both = api.get(f"{LOGS}?follow=true&after=12", headers={"last-event-id": "6"})
    assert sse(both) == [(13, "end")]


def test_a_reconnect_is_not_cut_to_the_tail(api):
    path = f"{LOGS}?follow=true&tail=1"
    assert sse(api.get(path)) == [(12, "state_change"), (13, "end")]
    assert sse(api.get(path, headers={"last-event-id": "10"})) == [
        (11, "state_change"),
        (12, "state_change"),
        (13, "end"),
    ]


def test_who_has_had_the_end_is_told_to_stop(api):
    answer = api.get(f"{LOGS}?follow=true", headers={"last-event-id": "13"})
    assert (answer.status_code, answer.content) == (204, b"")


def test_the_largest_seq_is_one_wherever_it_is_asked_for(api):
    largest = str(2**63 - 1)
    assert api.get(f"{LOGS}?after={largest}").status_code == 200
    assert api.get(f"{LOGS}?follow=true", headers={"last-event-id": largest}).status_code == 204
    assert StreamRequest.parse(QueryParams({"task_id": "task-001", "after": largest})).after == 2**63 - 1
    assert api.get(f"{LOGS}?after={2**63}").status_code == 400
    with pytest.raises(InvalidParameterError, match="from 0 to 9223372036854775807"):
        StreamRequest.parse(QueryParams({"task_id": "task-001", "after": str(2**63)}))


@pytest.mark.parametrize("identity", ["x", "-1", "9" * 5000, "9" * 19])
def test_an_event_id_that_is_none_is_refused(api, identity):
    answer = api.get(f"{LOGS}?follow=true", headers={"last-event-id": identity})
    assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, "Last-Event-ID")


def test_a_gap_reaches_every_follower_but_one_log_stream_only(api, tasks):
    tasks.add("task-002", e.Gap(3, 4, "disk full"))
    logs = "/api/v1/tasks/task-002/logs"
    assert lines(api.get(f"{logs}?stream=stdout")) == []
    assert len(lines(api.get(f"{logs}?stream=events"))) == 2
    tasks.tell("task-002", e.CancelRequested(), e.TaskFinished())
    assert [kind for _, kind in sse(api.get(f"{logs}?stream=stdout&follow=1"))] == ["gap", "end"]
