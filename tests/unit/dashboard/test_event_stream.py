"""A page follows a task's story, and goes on where it stopped."""

import json

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.model import events as e


def told(answer):
    messages = [message for message in answer.text.split("\n\n") if message]
    frames = [frame for message in messages for frame in json.loads(message.split("data: ", 1)[1])]
    ids = [int(message.split("\n")[0].removeprefix("id: ")) for message in messages]
    return ids, frames


@pytest.fixture
def ended(pages):
    output = e.Output.from_bytes("stdout", b"\x00\x1b[31m<script>\xff\n")
    metrics = e.Metrics(cpu_percent=12.5)
    pages.tasks.add("task-001", *TO_RUNNING, output, metrics, *TO_COMPLETED)
    return pages


def test_everything_is_told_and_numbered_to_the_end(ended):
    answer = ended.get("/tasks/task-001/story", accept="text/event-stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    ids, frames = told(answer)
    assert ids == [frames[-1]["seq"]]
    assert [frame["seq"] for frame in frames] == sorted({frame["seq"] for frame in frames})
    assert {"state_change", "output", "metrics", "end"} == {frame["type"] for frame in frames}
    assert frames[-1]["type"] == "end"
    assert next(frame for frame in frames if frame["type"] == "output")["data"] == "\x00\x1b[31m<script>\ufffd\n"


def test_it_goes_on_behind_what_the_page_has(ended):
    _, frames = told(ended.get("/tasks/task-001/story"))
    everything = [frame["seq"] for frame in frames]
    assert told(ended.get(f"/tasks/task-001/story?after={everything[3]}"))[1] == frames[4:]
    resumed = ended.get("/tasks/task-001/story?after=0", last_event_id=str(everything[-2]))
    assert told(resumed)[1] == frames[-1:]
    assert ended.get("/tasks/task-001/story", last_event_id=str(everything[-1])).status_code == 204


@pytest.mark.parametrize("after", ["x", "-1", "9" * 19, "١"])
def test_what_is_no_number_is_refused(ended, after):
    answer = ended.get(f"/tasks/task-001/story?after={after}", accept="text/event-stream")
    assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, "after")


def test_a_long_story_comes_in_messages_of_some_size(pages):
    pages.tasks.add("task-001", *TO_RUNNING, *[e.Output.from_bytes("stdout", b"x" * 1000)] * 500, *TO_COMPLETED)
    ids, frames = told(pages.get("/tasks/task-001/story"))
    assert len(frames) > 500
    assert 5 < len(ids) < 20
