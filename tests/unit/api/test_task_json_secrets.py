"""A task that failed because of a missing secret: all roles see the secret's name, and operators see its source."""

import msgspec
import pytest

from doubles.fake_tasks import TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import decode_task, encode_json
from sandbox.model.events import AttemptFailed, FollowUp, Record, TaskFinished
from sandbox.model.failure import Failure, FailureCode, missing_secrets_message

DETAIL = "Secret TOKEN (source vault, key team/app#password): Vault has nothing at this path."
PRIVATE = ("vault", "Vault", "team/app", "#password", "nothing at this")
OPERATOR, VIEWER = {"authorization": "Bearer olga"}, {"authorization": "Bearer vera"}
STATUS_PATHS = ("/api/v1/tasks/task-001", "/api/v1/tasks/task-001/wait?timeout=0", "/api/v1/tasks")
LOG_PATHS = (
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


@pytest.fixture(params=[NEW, OLD], ids=["current version", "earlier version"])
def failed_api(request, api_with_tokens, tasks):
    tasks.add("task-001", request.param, TaskFinished())
    return api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))


@pytest.mark.parametrize("path", STATUS_PATHS)
def test_status_detail_depends_on_the_role(failed_api, path):
    text = failed_api.get(path, headers=VIEWER).text
    assert "TOKEN" in text
    assert [word for word in PRIVATE if word in text] == []
    assert DETAIL in failed_api.get(path, headers=OPERATOR).text


@pytest.mark.parametrize("path", LOG_PATHS)
@pytest.mark.parametrize("headers", [{}, {"accept": "application/x-ndjson"}])
@pytest.mark.parametrize("role_headers", [VIEWER, OPERATOR])
def test_logs_contain_no_secret_source(failed_api, path, headers, role_headers):
    response = failed_api.get(path, headers=headers | role_headers)
    assert response.status_code == 200
    assert [word for word in PRIVATE if word in response.text] == []


def test_detail_of_earlier_attempts_depends_on_the_role(api_with_tokens, tasks):
    task = tasks.add("task-001", *TO_RUNNING)
    attempt = msgspec.structs.replace(task.attempt, failure=NEW.failure, follow_up=FollowUp.RETRY)
    tasks.entries["task-001"].task = msgspec.structs.replace(task, past_attempts=(attempt,))
    api = api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))
    response = api.get("/api/v1/tasks/task-001", headers=VIEWER)
    assert [word for word in PRIVATE if word in response.text] == []
    assert response.json()["attempts"][0]["error"]["code"] == "secret_unavailable"
    operator = api.get("/api/v1/tasks/task-001", headers=OPERATOR).json()
    assert operator["attempts"][0]["error"]["message"] == DETAIL


def test_without_tokens_the_caller_is_the_operator(api, tasks):
    tasks.add("task-001", NEW, TaskFinished())
    error = api.get("/api/v1/tasks/task-001").json()["error"]
    assert error == {"code": "secret_unavailable", "reason": None, "message": DETAIL, "remedy": None}


def test_secret_source_is_removed_from_a_transition_recorded_by_an_earlier_version():
    stored = {
        "seq": 3,
        "epoch": 1,
        "at": "2026-01-29T10:10:15.123Z",
        "event": {"type": "task_finished"},
        "transition": {"previous_state": "pending", "new_state": "failed", "message": DETAIL, "remedy": None},
    }
    record = msgspec.convert(stored, Record)
    assert record.transition.message == missing_secrets_message(["TOKEN"])
    other = stored | {"transition": stored["transition"] | {"message": "The agent said: Secret A (source b."}}
    assert msgspec.convert(other, Record).transition.message == "The agent said: Secret A (source b."


def test_each_secret_is_named_once_and_other_messages_are_unchanged():
    old = f"{DETAIL} Secret OTHER (source env, key X): it is not set. {DETAIL}"
    failure = Failure(FailureCode.SECRET_UNAVAILABLE, old)
    assert (failure.message, failure.detail) == (missing_secrets_message(["TOKEN", "OTHER"]), old)
    for code, message in (
        (FailureCode.SECRET_UNAVAILABLE, "The secrets of the task are larger than 256 KiB in total; use fewer."),
        (FailureCode.AGENT_FAILED, DETAIL),
    ):
        assert Failure(code, message) == Failure(code, message, detail="")
        assert Failure(code, message).message_for(is_operator=True) == message


def test_failure_is_unchanged_after_a_round_trip_through_the_index(tasks):
    task = tasks.add("task-001", NEW, TaskFinished())
    decoded = decode_task(encode_json(task))
    assert decoded.failure == NEW.failure
