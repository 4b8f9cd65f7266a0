"""Release of a preserved sandbox."""

import asyncio

from doubles.example_requests import FAILED_EVENTS, Example
from doubles.fake_tasks import TO_RUNNING
from doubles.manifests import manifest
from sandbox.interfaces.server_services import SandboxNotPreservedError
from sandbox.model import events as e
from sandbox.model.failure import Failure, FailureCode

EXAMPLES = (Example("release_sandbox", events=FAILED_EVENTS, is_sandbox_preserved=True),)

FAILED = (e.AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), e.TaskFinished())


def add_failed_preserved_task(tasks):
    """Add a failed task with a preserved sandbox."""
    asyncio.run(tasks.submit(manifest("task-001", lifecycle={"failure_action": "preserve"})))
    tasks.preserved.add("task-001")
    return tasks.record("task-001", *TO_RUNNING, *FAILED)


def test_sandbox_kept_field_is_true_until_the_release(api, tasks):
    add_failed_preserved_task(tasks)
    for path in ("", "/wait"):
        status = api.get(f"/api/v1/tasks/task-001{path}").json()
        assert (status["state"], status["sandbox_kept"]) == ("failed_preserved", True)
    api.delete("/api/v1/tasks/task-001/vm")
    for path in ("", "/wait"):
        status = api.get(f"/api/v1/tasks/task-001{path}").json()
        assert (status["state"], status["sandbox_kept"]) == ("failed_preserved", False)


def test_list_shows_which_sandboxes_are_still_preserved(api, tasks):
    add_failed_preserved_task(tasks)
    tasks.add("task-002")
    for is_kept in (True, False):
        items = api.get("/api/v1/tasks").json()["tasks"]
        assert {item["id"]: item["sandbox_kept"] for item in items} == {"task-001": is_kept, "task-002": False}
        assert {item["state"] for item in items} == {"failed_preserved", "pending"}
        api.delete("/api/v1/tasks/task-001/vm")


def test_error_for_a_sandbox_that_is_not_preserved_depends_on_the_reason(tasks):
    released = SandboxNotPreservedError(add_failed_preserved_task(tasks)).message
    assert "was released, or has expired" in released
    not_preserved_message = SandboxNotPreservedError(tasks.add("task-002")).message
    assert "it is pending, and only failed tasks with lifecycle.failure_action: preserve" in not_preserved_message


def test_preserved_sandbox_is_released_once(api, tasks):
    tasks.add("task-001")
    tasks.preserved.add("task-001")
    response = api.delete("/api/v1/tasks/task-001/vm")
    expected = {
        "success": True,
        "id": "task-001",
        "task_id": "task-001",
        "message": "The preserved sandbox of task task-001 is released.",
    }
    assert (response.status_code, response.json()) == (200, expected)
    assert not tasks.preserved
    second_response = api.delete("/api/v1/tasks/task-001/vm")
    assert (second_response.status_code, second_response.json()["error"]) == (404, "sandbox_not_found")


def test_error_code_distinguishes_a_missing_sandbox_from_an_unknown_path(api, tasks):
    tasks.add("task-001")
    missing = api.delete("/api/v1/tasks/task-001/vm").json()
    unknown = api.delete("/api/v1/tasks/task-001/vmm").json()
    assert (missing["error"], missing["task_state"]) == ("sandbox_not_found", "pending")
    assert unknown["error"] == "not_found"
    assert "task_state" not in unknown


def test_release_of_unknown_task_is_not_found(api):
    response = api.delete("/api/v1/tasks/nobody/vm")
    assert (response.status_code, response.json()["error"]) == (404, "task_not_found")


def test_only_the_delete_method_is_allowed_for_the_vm(api, tasks):
    tasks.add("task-001")
    response = api.get("/api/v1/tasks/task-001/vm")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE")
