"""Somebody is done with what a failed task left."""

import asyncio

import pytest

from doubles.fake_tasks import TO_RUNNING
from doubles.manifests import manifest
from sandbox.interfaces.tasks import SandboxNotPreservedError
from sandbox.model import events as e
from sandbox.model.errors import Failure, FailureCode

FAILED = (e.AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), e.TaskFinished())


def fail_preserved(tasks):
    """A task that has failed, whose sandbox is kept."""
    asyncio.run(tasks.submit(manifest("task-001", lifecycle={"failure_action": "preserve"})))
    tasks.preserved.add("task-001")
    return tasks.tell("task-001", *TO_RUNNING, *FAILED)


def test_the_status_tells_whether_a_sandbox_is_kept_until_it_is_released(api, tasks):
    fail_preserved(tasks)
    for address in ("", "/wait"):
        status = api.get(f"/api/v1/tasks/task-001{address}").json()
        assert (status["state"], status["sandbox_kept"]) == ("failed_preserved", True)
    api.delete("/api/v1/tasks/task-001/vm")
    for address in ("", "/wait"):
        status = api.get(f"/api/v1/tasks/task-001{address}").json()
        assert (status["state"], status["sandbox_kept"]) == ("failed_preserved", False)


def test_what_was_kept_once_and_what_never_was_are_told_apart(tasks):
    was_kept = SandboxNotPreservedError(fail_preserved(tasks)).message
    assert "was released, or has expired" in was_kept
    never = SandboxNotPreservedError(tasks.add("task-002")).message
    assert "failure_action: preserve" in never


def test_what_is_kept_is_released_once(api, tasks):
    tasks.add("task-001")
    tasks.preserved.add("task-001")
    answer = api.delete("/api/v1/tasks/task-001/vm")
    assert (answer.status_code, answer.json()["success"], answer.json()["task_id"]) == (200, True, "task-001")
    assert not tasks.preserved
    again = api.delete("/api/v1/tasks/task-001/vm")
    assert (again.status_code, again.json()["error"]) == (404, "not_found")


def test_nothing_is_kept_of_a_task_that_is_not_there(api):
    answer = api.delete("/api/v1/tasks/nobody/vm")
    assert (answer.status_code, answer.json()["error"]) == (404, "task_not_found")


def test_the_address_says_that_it_can_only_be_deleted(api, tasks):
    tasks.add("task-001")
    answer = api.get("/api/v1/tasks/task-001/vm")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE")


@pytest.mark.parametrize("address", ["task-001%2Fvm", "task-001%2fvm", "task-001%2F%2e%2e%2Ftask-001/vm"])
def test_a_slash_in_an_id_does_not_make_one_address_of_another(api, tasks, address):
    tasks.add("task-001")
    tasks.preserved.add("task-001")
    answer = api.delete(f"/api/v1/tasks/{address}")
    assert (answer.status_code, answer.json()["error"]) == (404, "task_not_found")
    assert answer.json()["instance"] == f"/api/v1/tasks/{address}"
    assert tasks.preserved == {"task-001"}
    assert api.get("/api/v1/tasks/task-001%2Fwait").json()["error"] == "task_not_found"
    assert api.get("/api/v1/tasks%2Ftask-001").json()["error"] == "not_found"
    # Its twin: an encoded letter is that letter.
    assert api.delete("/api/v1/tasks/t%61sk-001/vm").status_code == 200
