"""Repeated submissions with an idempotency key."""

import pytest

from doubles.fake_tasks import TO_RUNNING
from doubles.fake_token_store import FakeTokenStore

BODY = b"""{"version": "1", "kind": "Task", "metadata": {"name": "My Task", "id": "task-001"},
 "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
 "claude": {"prompt": "Your instructions here"}}"""


def submit(api, key, body=BODY):
    return api.post("/api/v1/tasks", content=body, headers={"Idempotency-Key": key})


def test_repeated_submission_returns_the_same_response(api, tasks):
    first, second = submit(api, "6f1c"), submit(api, "6f1c")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert first.headers["location"] == second.headers["location"] == "/api/v1/tasks/task-001"
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert list(tasks.entries) == ["task-001"]


def test_replayed_response_does_not_depend_on_progress(api, tasks):
    first = submit(api, "6f1c")
    tasks.record("task-001", *TO_RUNNING)
    assert submit(api, "6f1c").json() == first.json()


def test_submission_is_replayed_even_if_its_manifest_is_no_longer_valid(api_with_tokens):
    profiles = {"my-tools": ""}
    api = api_with_tokens(FakeTokenStore(), list_profiles=lambda: profiles)
    body = BODY.replace(b'"repository"', b'"vm": {"profile": "my-tools"}, "repository"')
    first = submit(api, "6f1c", body)
    profiles.clear()
    assert submit(api, "6f1d", body).status_code == 400
    assert (first.status_code, submit(api, "6f1c", body).json()) == (202, first.json())


def test_different_body_with_a_reused_key_is_rejected(api, tasks):
    submit(api, "6f1c")
    response = submit(api, "6f1c", BODY.replace(b"task-001", b"task-002"))
    assert (response.status_code, response.json()["error"]) == (422, "idempotency_key_reused")
    assert list(tasks.entries) == ["task-001"]


def test_existing_task_id_with_a_new_key_is_reported_as_a_duplicate(api):
    submit(api, "6f1c")
    response = submit(api, "6f1d")
    assert (response.status_code, response.json()["error"]) == (409, "duplicate_task_id")


@pytest.mark.parametrize("key", ["", " ", "two words", "x" * 256, "grün".encode(), b"\x00"])
def test_invalid_key_is_rejected(api, tasks, key):
    response = submit(api, key)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert response.json()["details"][0]["field"] == "Idempotency-Key"
    assert not tasks.entries


@pytest.mark.parametrize("key", ["!", "~" * 255, 'a,b;c="d"'])
def test_visible_ascii_keys_are_accepted(api, tasks, key):
    assert submit(api, key).status_code == 202
    assert tasks.entries["task-001"].task.idempotency.key == key


def test_two_idempotency_keys_are_rejected(api, tasks):
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert api.post("/api/v1/tasks", content=BODY, headers=headers).status_code == 400
    assert not tasks.entries
