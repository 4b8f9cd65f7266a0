"""Submission of manifests in every accepted format."""

import json

import pytest

from doubles.example_requests import MANIFEST, Example
from sandbox.interfaces.server_services import InsufficientResourcesError, UnavailableError
from sandbox.model import fixed_limits

EXAMPLES = (Example("submit_task", headers={"Idempotency-Key": "build-4711"}, body=MANIFEST, events=None),)

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
# The default content type of curl.
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
def test_manifest_is_accepted_in_every_format(api, content_type, body):
    headers = {"content-type": content_type} if content_type else {}
    response = api.post("/api/v1/tasks", content=body, headers=headers)
    assert response.status_code == 202
    assert response.headers["location"] == "/api/v1/tasks/task-001"
    assert response.json() == {
        "id": "task-001",
        "task_id": "task-001",
        "state": "pending",
        "message": "Task task-001 was accepted.",
        "created_at": "2026-01-29T10:10:15.124Z",
        "links": {
            "self": "/api/v1/tasks/task-001",
            "logs": "/api/v1/tasks/task-001/logs",
            "artifacts": "/api/v1/tasks/task-001/artifacts",
            "patch": "/api/v1/tasks/task-001/artifacts/task-001.patch",
            "manifest": "/api/v1/tasks/task-001/manifest",
            "html": "/tasks/task-001",
        },
    }
    assert api.tasks.entries["task-001"].task.manifest.agent.prompt == "Your instructions here"


def test_yaml_with_json_content_type_is_rejected(api):
    response = api.post("/api/v1/tasks", content=YAML, headers={"content-type": JSON})
    assert (response.status_code, response.json()["error"]) == (400, "invalid_manifest")


def test_all_errors_are_reported_with_their_lines(api):
    broken = YAML.replace('branch: "main"', 'branch: ""').replace("kind: Task", "kind: Job")
    response = api.post("/api/v1/tasks", content=broken, headers={"content-type": "application/yaml"})
    problem = response.json()
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["error"] == "invalid_manifest"
    assert {(detail["field"], detail["line"]) for detail in problem["details"]} == {
        ("kind", 3),
        ("repository.branch", 9),
    }
    assert problem["status"] == 400
    assert problem["detail"] == problem["message"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["instance"] == "/api/v1/tasks"


def test_duplicate_id_error_contains_the_existing_task(api):
    api.tasks.add("task-001")
    response = api.post("/api/v1/tasks", content=YAML)
    assert (response.status_code, response.json()["error"]) == (409, "duplicate_task_id")
    assert response.json()["existing_task"] == {
        "id": "task-001",
        "state": "pending",
        "created_at": "2026-01-29T10:10:15.124Z",
    }


def test_insufficient_resources_error_contains_the_amounts(api):
    api.tasks.failure = InsufficientResourcesError(
        ["64 CPUs (16 in all)"],
        requested_cpus=64,
        available_cpus=16,
        requested_memory_bytes=64 * 1024**3,
        available_memory_bytes=1536 * 1024**2,
    )
    response = api.post("/api/v1/tasks", content=YAML)
    problem = response.json()
    assert (response.status_code, problem["error"]) == (507, "insufficient_resources")
    assert (problem["requested_cpus"], problem["available_cpus"]) == (64, 16)
    assert (problem["requested_memory"], problem["available_memory"]) == ("64G", "1536M")


def test_unavailable_response_has_a_retry_after_header(api):
    api.tasks.failure = UnavailableError("The disk is full.")
    response = api.post("/api/v1/tasks", content=YAML)
    assert (response.status_code, response.json()["error"]) == (503, "service_unavailable")
    assert int(response.headers["retry-after"]) > 0


def test_body_size_limit_is_exact(api):
    largest = (YAML + "#").ljust(fixed_limits.BODY_BYTES_MAX, "x")
    assert api.post("/api/v1/tasks", content=largest).status_code == 202
    response = api.post("/api/v1/tasks", content=largest + "x")
    assert (response.status_code, response.json()["error"]) == (413, "payload_too_large")


def test_endless_body_is_read_up_to_the_limit(api):
    sent = 0

    async def endless_body():
        nonlocal sent
        while True:
            sent += 64 * 1024
            yield b"x" * 64 * 1024

    assert api.post("/api/v1/tasks", content=endless_body()).status_code == 413
    assert sent <= fixed_limits.BODY_BYTES_MAX + 2 * 64 * 1024


def test_internal_error_reveals_no_details(api):
    api.tasks.failure = RuntimeError("password is hunter2 in /srv/index.sqlite")
    response = api.post("/api/v1/tasks", content=YAML, headers={"x-request-id": "from-the-client.1"})
    assert (response.status_code, response.json()["error"]) == (500, "internal_error")
    assert "hunter2" not in response.text
    assert response.headers["x-request-id"] == response.json()["request_id"] == "from-the-client.1"


def test_dry_run_returns_errors_and_submits_nothing(api, tasks):
    response = api.post("/api/v1/tasks?dry_run=true", content=YAML)
    assert (response.status_code, response.json()["dry_run"]) == (200, True)
    assert response.json()["definition"]["vm"]["memory"] == "8G"
    assert tasks.entries == {}
    dry_run = api.post("/api/v1/tasks?dry_run=true", content=YAML.replace("branch", "brunch"))
    submitted = api.post("/api/v1/tasks", content=YAML.replace("branch", "brunch"))
    assert (dry_run.status_code, dry_run.json()["details"]) == (400, submitted.json()["details"])
    tasks.add("task-001")
    assert api.post("/api/v1/tasks?dry_run=true", content=YAML).status_code == 409
    assert api.post("/api/v1/tasks?dry_run=false", content=YAML.replace("task-001", "task-002")).status_code == 202


def test_submission_can_name_the_task_that_it_reruns(api, tasks):
    assert api.post("/api/v1/tasks", content=YAML).status_code == 202
    changed = YAML.replace("task-001", "task-002").replace("Your", "Other")
    response = api.post("/api/v1/tasks?rerun_of=absent", content=changed)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert response.json()["details"][0]["field"] == "rerun_of"
    assert api.post("/api/v1/tasks?rerun_of=task-001", content=changed).status_code == 202
    assert [tasks.entries[task_id].task.rerun_of for task_id in ("task-001", "task-002")] == [None, "task-001"]
