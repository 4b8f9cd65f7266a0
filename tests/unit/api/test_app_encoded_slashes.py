"""An encoded slash in a task's id does not address another route."""

import pytest


@pytest.mark.parametrize("path", ["task-001%2Fvm", "task-001%2fvm", "task-001%2F%2e%2e%2Ftask-001/vm"])
def test_encoded_slash_in_an_id_does_not_match_another_route(api, tasks, path):
    tasks.add("task-001")
    tasks.preserved.add("task-001")
    response = api.delete(f"/api/v1/tasks/{path}")
    assert (response.status_code, response.json()["error"]) == (404, "task_not_found")
    assert response.json()["instance"] == f"/api/v1/tasks/{path}"
    assert tasks.preserved == {"task-001"}
    assert api.get("/api/v1/tasks/task-001%2Fwait").json()["error"] == "task_not_found"
    assert api.get("/api/v1/tasks%2Ftask-001").json()["error"] == "not_found"
    # For comparison, an encoded letter is decoded.
    assert api.delete("/api/v1/tasks/t%61sk-001/vm").status_code == 200
