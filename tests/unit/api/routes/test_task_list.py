"""Somebody looks at tasks, waits for one, cancels one."""

import time

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import UnavailableError
from sandbox.model import events as e
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.task_state import TaskState

KEYS = {
    "id", "name", "state", "labels", "created_at", "started_at", "finished_at", "state_changed_at", "state_message",
    "vm_name", "vm_ip", "vm", "exit_code", "error", "attempts", "progress", "result",
}  # fmt: skip


def test_a_waiting_task_has_every_key_and_the_defaults_filled_in(api, tasks):
    tasks.add(labels={"team": "platform"})
    status = api.get("/api/v1/tasks/task-001").json()
    assert set(status) == KEYS | {"definition", "sandbox_kept"}
    assert status["sandbox_kept"] is False
    assert (status["state"], status["labels"]) == ("pending", {"team": "platform"})
    assert (status["started_at"], status["finished_at"], status["exit_code"], status["error"]) == (None,) * 4
    assert (status["vm_name"], status["vm_ip"], status["vm"]["runtime"], status["vm"]["cpus"]) == (None, None, None, 4)
    assert status["definition"]["vm"]["profile"] == "agentic-dev"
    assert status["definition"]["lifecycle"]["timeout"] == "24h"
    assert status["definition"]["secrets"] == []
    assert status["progress"]["last_activity_at"] is None


def test_a_finished_task_tells_when_and_how(api, tasks):
    tasks.add("task-001", *TO_RUNNING, e.Progress(turns=3, current_tool="Bash"), *TO_COMPLETED)
    status = api.get("/api/v1/tasks/task-001").json()
    assert (status["state"], status["exit_code"], status["result"]) == ("completed", 0, {"is_error": False})
    assert status["started_at"] == "2026-01-29T10:10:15.128Z"
    assert status["finished_at"] == status["state_changed_at"] == "2026-01-29T10:10:15.131Z"
    assert status["vm"]["runtime"] == "bubblewrap"
    assert status["vm_name"] == "sandbox-abcdefghijkl"
    assert status["progress"]["turns"] == 3


def test_a_failed_task_says_why(api, tasks):
    tasks.add("task-001", e.AttemptFailed(Failure(FailureCode.CLONE_FAILED, "There is no branch main.")))
    tasks.tell("task-001", e.TaskFinished())
    assert api.get("/api/v1/tasks/task-001").json()["error"] == {
        "code": "clone_failed",
        "message": "There is no branch main.",
    }


def test_an_unknown_task_is_told_apart_from_an_unknown_address(api):
    for path in ("", "/wait", "/logs", "/artifacts", "/artifacts/x"):
        answer = api.get(f"/api/v1/tasks/nobody{path}")
        assert (answer.status_code, answer.json()["error"]) == (404, "task_not_found")
    for path in ("/", "/api/v1/task", "/api/v1/tasks/", "/api/v1/tasks/a/b"):
        answer = api.get(path)
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


def test_a_wrong_method_is_told_the_right_ones(api):
    answer = api("PATCH", "/api/v1/tasks")
    assert (answer.status_code, answer.json()["error"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert api("PUT", "/api/v1/tasks/task-001").headers["allow"] == "DELETE, GET, HEAD"


def test_a_list_is_a_page(api, tasks):
    for number in range(5):
        tasks.add(f"task-{number}")
    page = api.get("/api/v1/tasks?limit=2&offset=2").json()
    assert [item["id"] for item in page["tasks"]] == ["task-2", "task-3"]
    assert set(page["tasks"][0]) == KEYS
    assert (page["total_count"], page["limit"], page["offset"], page["has_more"]) == (5, 2, 2, True)
    assert page["next_cursor"]
    last = api.get("/api/v1/tasks?limit=2&offset=4").json()
    assert (last["has_more"], last["next_cursor"]) == (False, None)
    assert api.get("/api/v1/tasks?offset=99").json()["tasks"] == []


def test_what_a_list_is_asked_for_reaches_the_store(api, tasks):
    api.get("/api/v1/tasks")
    api.get("/api/v1/tasks?state=running,pending&label.team=platform&label.x.y=1&sort=name&order=asc&limit=7&offset=3")
    assert tasks.queries == [
        TaskQuery(),
        TaskQuery(
            states=frozenset({TaskState.RUNNING, TaskState.PENDING}),
            labels={"team": "platform", "x.y": "1"},
            sort="name",
            order="asc",
            limit=7,
            offset=3,
        ),
    ]


def test_two_values_of_one_label_are_had_by_no_task(api, tasks):
    tasks.add(labels={"team": "a"})
    assert api.get("/api/v1/tasks?label.team=a&label.team=a").json()["total_count"] == 1
    assert api.get("/api/v1/tasks?label.team=a&label.team=b").json()["total_count"] == 0


@pytest.mark.parametrize(
    ("path", "field", "rule"),
    [
        ("/api/v1/tasks?limit=0", "limit", "range"),
        ("/api/v1/tasks?limit=1001", "limit", "range"),
        ("/api/v1/tasks?limit=many", "limit", "type"),
        ("/api/v1/tasks?offset=-1", "offset", "range"),
        ("/api/v1/tasks?offset=99999999999999999999999", "offset", "range"),
        ("/api/v1/tasks?state=sleeping", "state", "enum"),
        ("/api/v1/tasks?sort=age", "sort", "enum"),
        ("/api/v1/tasks?cursor=abc", "cursor", "format"),
        ("/api/v1/tasks/task-001/wait?timeout=601", "timeout", "range"),
        ("/api/v1/tasks/task-001/wait?timeout=nan", "timeout", "range"),
        ("/api/v1/tasks/task-001/logs?tail=-1", "tail", "range"),
        ("/api/v1/tasks/task-001/logs?stream=stdin", "stream", "enum"),
        ("/api/v1/tasks/task-001/logs?follow=perhaps", "follow", "type"),
        ("/api/v1/tasks/task-001/logs?since=yesterday", "since", "format"),
        ("/api/v1/tasks/task-001/logs?since=2026-01-29T10:10:15", "since", "format"),
        ("/api/v1/tasks/task-001/logs?since=0001-01-01T00:00:00%2B23:59", "since", "format"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(api, tasks, path, field, rule):
    tasks.add("task-001")
    answer = api.get(path)
    problem = answer.json()
    assert (answer.status_code, problem["error"]) == (400, "invalid_parameter")
    assert [(found["field"], found["rule"]) for found in problem["details"]] == [(field, rule)]


def test_waiting_ends_with_the_task_or_with_the_time(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    assert api.get("/api/v1/tasks/task-001/wait?timeout=0.01").json()["state"] == "running"
    tasks.tell("task-001", *TO_COMPLETED)
    started = time.monotonic()
    assert api.get("/api/v1/tasks/task-001/wait").json()["state"] == "completed"
    assert time.monotonic() - started < 5


def test_a_cancel_says_what_was_and_what_will_be(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    assert api.delete("/api/v1/tasks/task-001").json() == {
        "success": True,
        "task_id": "task-001",
        "previous_state": "running",
        "new_state": "cancelled",
        "message": "Task task-001 is being cancelled.",
        "cancelled_at": "2026-01-29T10:10:15.000Z",
    }


@pytest.mark.parametrize(
    ("query", "body", "wish"),
    [
        ("", b"", ("", False)),
        ("?reason=too+slow&force=true", b"", ("too slow", True)),
        ("", b'{"reason": "too slow"}', ("too slow", False)),
        ("?force=true", b' {"reason": "late"}\n', ("late", True)),
        (
            "",
            '{"reason": "10\u00a0€, said \U0001f469\u200d\U0001f4bb"}'.encode(),
            ("10\u00a0€, said \U0001f469\u200d\U0001f4bb", False),
        ),
    ],
)
def test_a_cancel_may_have_a_reason_and_force(api, tasks, query, body, wish):
    tasks.add("task-001")
    assert api.delete(f"/api/v1/tasks/task-001{query}", content=body).status_code == 200
    assert tasks.cancels == [("task-001", *wish)]


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", b"[1]"),
        ("", b"{"),
        ("", b'{"force": "yes"}'),
        ("", b'{"forse": true}'),
        ("", b"[" * 100_000),
        ("", '{"reason": "zu spät"}'.encode("latin-1")),
        ("?force=perhaps", b""),
        ("?reason=%1b%5b2J", b""),
        ("?reason=two%0alines", b""),
        ("", '{"reason": "two\u2028lines"}'.encode()),
        ("", b'{"reason": "\\ud800"}'),
        ("", b'{"reason": "%s"}' % (b"x" * 1025)),
    ],
)
def test_a_cancel_that_is_not_understood_cancels_nothing(api, tasks, query, body):
    tasks.add("task-001")
    answer = api.delete(f"/api/v1/tasks/task-001{query}", content=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_parameter")
    assert tasks.cancels == []


def test_a_task_that_has_ended_cannot_be_cancelled(api, tasks):
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    answer = api.delete("/api/v1/tasks/task-001")
    assert (answer.status_code, answer.json()["error"]) == (409, "task_already_terminal")
    assert answer.json()["task_state"] == "completed"


def test_a_cancel_that_no_runner_answers_may_be_tried_again(api, tasks):
    tasks.add("task-001")
    tasks.failure = UnavailableError("The runner of task task-001 does not respond; try again.")
    answer = api.delete("/api/v1/tasks/task-001")
    assert (answer.status_code, answer.json()["error"]) == (503, "service_unavailable")


def test_head_gives_the_head_of_get(api, tasks):
    tasks.add("task-001")
    head, body = api("HEAD", "/api/v1/tasks/task-001"), api.get("/api/v1/tasks/task-001")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == body.headers["content-length"] == str(len(body.content))
    assert (
        api("HEAD", "/api/v1/tasks/task-001/logs?follow=true").headers["content-type"].startswith("text/event-stream")
    )


def test_every_answer_has_its_id_and_is_kept_by_no_cache(api, tasks):
    tasks.add("task-001")
    for path in ("/api/v1/tasks/task-001", "/nowhere", "/api/v1/tasks?limit=0"):
        answer = api.get(path, headers={"x-request-id": "evil\tid"})
        assert answer.headers["x-request-id"] not in {"", "evil\tid"}
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert api.get("/", headers={"x-request-id": "mine-1"}).json()["request_id"] == "mine-1"
