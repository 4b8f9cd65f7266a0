"""Somebody hands in a manifest, in whatever form their tool sends it."""

import json

import pytest

from sandbox.interfaces.tasks import InsufficientResourcesError, UnavailableError
from sandbox.model import limits

YAML = """
version: "1"
kind: Task
metadata:
  name: "My Task"
  id: task-001
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Your instructions here"
"""
DATA = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "My Task", "id": "task-001"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Your instructions here"},
}
JSON = "application/json"
# What curl sends when it is not told otherwise.
FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/yaml", YAML),
        ("text/yaml", YAML),
        ("application/x-yaml; charset=utf-8", YAML),
        (FORM, YAML),
        ("", YAML),
        (FORM, json.dumps(DATA)),
        (JSON, json.dumps(DATA)),
        ("Application/JSON; charset=utf-8", json.dumps(DATA)),
        ("application/vnd.sandbox+json", json.dumps(DATA)),
        (JSON, json.dumps({"manifest": DATA})),
        (JSON, json.dumps({"manifest_yaml": YAML})),
    ],
)
def test_a_manifest_is_taken_in_every_form(api, content_type, body):
    headers = {"content-type": content_type} if content_type else {}
    answer = api.post("/api/v1/tasks", content=body, headers=headers)
    assert answer.status_code == 202
    assert answer.headers["location"] == "/api/v1/tasks/task-001"
    assert answer.json() == {
        "task_id": "task-001",
        "state": "pending",
        "message": "Task task-001 was accepted.",
        "created_at": "2026-01-29T10:10:15.124Z",
        "links": {
            "self": "/api/v1/tasks/task-001",
            "logs": "/api/v1/tasks/task-001/logs",
            "artifacts": "/api/v1/tasks/task-001/artifacts",
        },
    }
    assert api.tasks.stories["task-001"].task.manifest.claude.prompt == "Your instructions here"


def test_yaml_that_claims_to_be_json_is_refused(api):
    answer = api.post("/api/v1/tasks", content=YAML, headers={"content-type": JSON})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_manifest")


def test_all_mistakes_are_told_at_once_with_their_places(api):
    broken = YAML.replace('branch: "main"', 'branch: ""').replace("kind: Task", "kind: Job")
    answer = api.post("/api/v1/tasks", content=broken, headers={"content-type": "application/yaml"})
    problem = answer.json()
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["error"] == "invalid_manifest"
    assert {(found["field"], found["line"]) for found in problem["details"]} == {("kind", 3), ("repository.branch", 9)}
    assert problem["status"] == 400
    assert problem["detail"] == problem["message"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["instance"] == "/api/v1/tasks"


def test_an_id_that_is_taken_is_told_with_the_task_that_has_it(api):
    api.tasks.add("task-001")
    answer = api.post("/api/v1/tasks", content=YAML)
    assert (answer.status_code, answer.json()["error"]) == (409, "duplicate_task_id")
    assert answer.json()["existing_task"] == {
        "id": "task-001",
        "state": "pending",
        "created_at": "2026-01-29T10:10:15.124Z",
    }


def test_what_can_never_fit_is_told_with_its_figures(api):
    api.tasks.failure = InsufficientResourcesError(
        ["64 CPUs (16 in all)"],
        requested_cpus=64,
        available_cpus=16,
        requested_memory_bytes=64 * 1024**3,
        available_memory_bytes=1536 * 1024**2,
    )
    answer = api.post("/api/v1/tasks", content=YAML)
    problem = answer.json()
    assert (answer.status_code, problem["error"]) == (507, "insufficient_resources")
    assert (problem["requested_cpus"], problem["available_cpus"]) == (64, 16)
    assert (problem["requested_memory"], problem["available_memory"]) == ("64G", "1536M")


def test_a_server_that_cannot_take_tasks_says_when_to_try_again(api):
    api.tasks.failure = UnavailableError("The disk is full.")
    answer = api.post("/api/v1/tasks", content=YAML)
    assert (answer.status_code, answer.json()["error"]) == (503, "service_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_the_largest_body_is_read_and_one_byte_more_is_not(api):
    largest = (YAML + "#").ljust(limits.BODY_BYTES_MAX, "x")
    assert api.post("/api/v1/tasks", content=largest).status_code == 202
    answer = api.post("/api/v1/tasks", content=largest + "x")
    assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")


def test_an_endless_body_without_a_length_is_read_no_further_than_the_bound(api):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 64 * 1024
            yield b"x" * 64 * 1024

    assert api.post("/api/v1/tasks", content=endless()).status_code == 413
    assert sent <= limits.BODY_BYTES_MAX + 2 * 64 * 1024


def test_a_failure_inside_tells_nothing_of_the_inside(api):
    api.tasks.failure = RuntimeError("password is hunter2 in /srv/index.sqlite")
    answer = api.post("/api/v1/tasks", content=YAML, headers={"x-request-id": "from-the-client.1"})
    assert (answer.status_code, answer.json()["error"]) == (500, "internal_error")
    assert "hunter2" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "from-the-client.1"


def test_a_dry_run_tells_what_a_submission_would_and_submits_nothing(api, tasks):
    answer = api.post("/api/v1/tasks?dry_run=true", content=YAML)
    assert (answer.status_code, answer.json()["dry_run"]) == (200, True)
    assert answer.json()["definition"]["vm"]["memory"] == "8G"
    assert tasks.stories == {}
    mistaken = api.post("/api/v1/tasks?dry_run=true", content=YAML.replace("branch", "brunch"))
    submitted = api.post("/api/v1/tasks", content=YAML.replace("branch", "brunch"))
    assert (mistaken.status_code, mistaken.json()["details"]) == (400, submitted.json()["details"])
    tasks.add("task-001")
    assert api.post("/api/v1/tasks?dry_run=true", content=YAML).status_code == 409
    assert api.post("/api/v1/tasks?dry_run=false", content=YAML.replace("task-001", "task-002")).status_code == 202
