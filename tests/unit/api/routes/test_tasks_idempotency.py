"""Somebody does not know whether a submission arrived, and sends it again."""

import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_RUNNING

BODY = b"""{"version": "1", "kind": "Task", "metadata": {"name": "My Task", "id": "task-001"},
 "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
 "claude": {"prompt": "Your instructions here"}}"""


def submit(api, key, body=BODY):
    return api.post("/api/v1/tasks", content=body, headers={"Idempotency-Key": key})


def test_the_same_submission_gives_the_same_answer_and_says_so(api, tasks):
    first, again = submit(api, "6f1c"), submit(api, "6f1c")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"] == "/api/v1/tasks/task-001"
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert list(tasks.stories) == ["task-001"]


def test_a_task_that_went_on_meanwhile_is_answered_as_it_was_taken(api, tasks):
    first = submit(api, "6f1c")
    tasks.tell("task-001", *TO_RUNNING)
    assert submit(api, "6f1c").json() == first.json()


def test_what_was_taken_is_answered_when_the_server_would_take_it_no_more(guarded_api):
    offered = {"my-tools": ""}
    api = guarded_api(FakeAccess(), profiles=lambda: offered)
    body = BODY.replace(b'"repository"', b'"vm": {"profile": "my-tools"}, "repository"')
    first = submit(api, "6f1c", body)
    offered.clear()
    assert submit(api, "6f1d", body).status_code == 400
    assert (first.status_code, submit(api, "6f1c", body).json()) == (202, first.json())


def test_another_body_with_the_same_key_is_refused(api, tasks):
    submit(api, "6f1c")
    answer = submit(api, "6f1c", BODY.replace(b"task-001", b"task-002"))
    assert (answer.status_code, answer.json()["error"]) == (422, "idempotency_key_reused")
    assert list(tasks.stories) == ["task-001"]


def test_another_key_does_not_hide_that_the_task_is_there(api):
    submit(api, "6f1c")
    answer = submit(api, "6f1d")
    assert (answer.status_code, answer.json()["error"]) == (409, "duplicate_task_id")


@pytest.mark.parametrize("key", ["", " ", "two words", "x" * 256, "grün".encode(), b"\x00"])
def test_a_key_that_cannot_be_one_takes_no_task(api, tasks, key):
    answer = submit(api, key)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_parameter")
    assert answer.json()["details"][0]["field"] == "Idempotency-Key"
    assert not tasks.stories


@pytest.mark.parametrize("key", ["!", "~" * 255, 'a,b;c="d"'])
def test_every_visible_key_is_one(api, tasks, key):
    assert submit(api, key).status_code == 202
    assert tasks.stories["task-001"].task.idempotency.key == key


def test_two_keys_are_one_too_many(api, tasks):
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert api.post("/api/v1/tasks", content=BODY, headers=headers).status_code == 400
    assert not tasks.stories
