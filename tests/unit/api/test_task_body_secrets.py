"""A task failed for want of a secret: everybody is told its name, and operators where its value was to come from."""

import msgspec
import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_RUNNING
from sandbox.model.errors import Failure, FailureCode, missing_secrets_message
from sandbox.model.events import AttemptFailed, Record, RetryKind, TaskFinished
from sandbox.model.task import Task

DETAIL = "Secret TOKEN (source vault, key team/app#password): Vault has nothing at this path."
PRIVATE = ("vault", "Vault", "team/app", "#password", "nothing at this")
OPERATOR, VIEWER = {"authorization": "Bearer olga"}, {"authorization": "Bearer vera"}
STATUSES = ("/api/v1/tasks/task-001", "/api/v1/tasks/task-001/wait?timeout=0", "/api/v1/tasks")
STORIES = (
    "/api/v1/tasks/task-001/logs",
    "/api/v1/tasks/task-001/logs?stream=events",
    "/api/v1/tasks/task-001/logs?follow=true",
    "/api/v1/tasks/task-001/artifacts",
    "/metrics",
)
NEW = AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, missing_secrets_message(["TOKEN"]), detail=DETAIL))
OLD = msgspec.json.decode(
    b'{"type": "attempt_failed", "failure": {"code": "secret_unavailable", "message": "%s"}}' % DETAIL.encode(),
    type=AttemptFailed,
)


@pytest.fixture(params=[NEW, OLD], ids=["written now", "written by an earlier version"])
def failed(request, guarded_api, tasks):
    tasks.add("task-001", request.param, TaskFinished())
    return guarded_api(FakeAccess(olga="operator", vera="viewer"))


@pytest.mark.parametrize("path", STATUSES)
def test_a_status_tells_by_role(failed, path):
    shown = failed.get(path, headers=VIEWER).text
    assert "TOKEN" in shown
    assert [word for word in PRIVATE if word in shown] == []
    assert DETAIL in failed.get(path, headers=OPERATOR).text


@pytest.mark.parametrize("path", STORIES)
@pytest.mark.parametrize("headers", [{}, {"accept": "application/x-ndjson"}])
@pytest.mark.parametrize("who", [VIEWER, OPERATOR])
def test_a_story_tells_nobody(failed, path, headers, who):
    told = failed.get(path, headers=headers | who)
    assert told.status_code == 200
    assert [word for word in PRIVATE if word in told.text] == []


def test_a_status_tells_of_earlier_attempts_by_role(guarded_api, tasks):
    task = tasks.add("task-001", *TO_RUNNING)
    attempt = msgspec.structs.replace(task.attempt, failure=NEW.failure, follow_up=RetryKind.RETRY)
    tasks.stories["task-001"].task = msgspec.structs.replace(task, past_attempts=(attempt,))
    api = guarded_api(FakeAccess(olga="operator", vera="viewer"))
    shown = api.get("/api/v1/tasks/task-001", headers=VIEWER)
    assert [word for word in PRIVATE if word in shown.text] == []
    assert shown.json()["attempts"][0]["error"]["code"] == "secret_unavailable"
    operator = api.get("/api/v1/tasks/task-001", headers=OPERATOR).json()
    assert operator["attempts"][0]["error"]["message"] == DETAIL


def test_without_tokens_whoever_asks_is_the_operator(api, tasks):
    tasks.add("task-001", NEW, TaskFinished())
    assert api.get("/api/v1/tasks/task-001").json()["error"] == {"code": "secret_unavailable", "message": DETAIL}


def test_what_an_earlier_version_stamped_is_read_without_it():
    written = {
        "seq": 3,
        "epoch": 1,
        "at": "2026-01-29T10:10:15.123Z",
        "event": {"type": "task_finished"},
        "transition": {"previous_state": "pending", "new_state": "failed", "message": DETAIL},
    }
    record = msgspec.convert(written, Record)
    assert record.transition.message == missing_secrets_message(["TOKEN"])
    other = written | {"transition": written["transition"] | {"message": "The agent said: Secret A (source b."}}
    assert msgspec.convert(other, Record).transition.message == "The agent said: Secret A (source b."


def test_several_are_named_once_each_and_other_reasons_stay():
    old = f"{DETAIL} Secret OTHER (source env, key X): it is not set. {DETAIL}"
    failure = Failure(FailureCode.SECRET_UNAVAILABLE, old)
    assert (failure.message, failure.detail) == (missing_secrets_message(["TOKEN", "OTHER"]), old)
    for code, message in (
        (FailureCode.SECRET_UNAVAILABLE, "The secrets of the task are larger than 256 KiB together; use fewer."),
        (FailureCode.AGENT_FAILED, DETAIL),
    ):
        assert Failure(code, message) == Failure(code, message, detail="")
        assert Failure(code, message).message_for(is_operator=True) == message


def test_it_survives_the_index(tasks):
    task = tasks.add("task-001", NEW, TaskFinished())
    again = msgspec.json.decode(msgspec.json.encode(task), type=Task)
    assert again.failure == NEW.failure
