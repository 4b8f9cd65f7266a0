"""A page follows a task's events, and resumes after the last event that the page received."""

import json

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.model import events as e


def parse_events(response):
    messages = [message for message in response.text.split("\n\n") if message]
    events = [event for message in messages for event in json.loads(message.split("data: ", 1)[1])]
    ids = [int(message.split("\n")[0].removeprefix("id: ")) for message in messages]
    return ids, events


@pytest.fixture
def finished_task(pages):
    output = e.Output.from_bytes("stdout", b"\x00\x1b[31m<script>\xff\n")
    metrics = e.Metrics(cpu_percent=12.5)
    pages.tasks.add("task-001", *TO_RUNNING, output, metrics, *TO_COMPLETED)
    return pages


def test_stream_has_all_events_in_order_up_to_the_end(finished_task):
    response = finished_task.get("/tasks/task-001/story", accept="text/event-stream")
    assert response.headers["content-type"].startswith("text/event-stream")
    ids, events = parse_events(response)
    assert ids == [events[-1]["seq"]]
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert {"state_change", "output", "metrics", "end"} == {event["type"] for event in events}
    assert events[-1]["type"] == "end"
    assert next(event for event in events if event["type"] == "output")["data"] == "\x00\x1b[31m<script>\ufffd\n"


def test_stream_resumes_after_the_last_event_id(finished_task):
    _, events = parse_events(finished_task.get("/tasks/task-001/story"))
    seqs = [event["seq"] for event in events]
    assert parse_events(finished_task.get(f"/tasks/task-001/story?after={seqs[3]}"))[1] == events[4:]
    resumed = finished_task.get("/tasks/task-001/story?after=0", last_event_id=str(seqs[-2]))
    assert parse_events(resumed)[1] == events[-1:]
    assert finished_task.get("/tasks/task-001/story", last_event_id=str(seqs[-1])).status_code == 204


@pytest.mark.parametrize("after", ["x", "-1", "9" * 19, "١"])
def test_invalid_after_parameter_is_rejected(finished_task, after):
    response = finished_task.get(f"/tasks/task-001/story?after={after}", accept="text/event-stream")
    assert (response.status_code, response.json()["details"][0]["field"]) == (400, "after")


def test_events_are_batched_into_messages(pages):
    pages.tasks.add("task-001", *TO_RUNNING, *[e.Output.from_bytes("stdout", b"x" * 1000)] * 500, *TO_COMPLETED)
    ids, events = parse_events(pages.get("/tasks/task-001/story"))
    assert len(events) > 500
    assert 5 < len(ids) < 20
