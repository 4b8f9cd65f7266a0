"""Deletion of a finished task."""

from doubles.example_requests import Example
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore

EXAMPLES = (Example("delete_task"),)

PATH = "/api/v1/tasks/task-001/data"


def test_ended_task_is_deleted_once(api, tasks):
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    tasks.add("task-002")
    response = api.delete(PATH)
    expected = {"success": True, "id": "task-001", "task_id": "task-001", "message": "Task task-001 was deleted."}
    assert (response.status_code, response.json()) == (200, expected)
    for again in (api.delete(PATH), api.get("/api/v1/tasks/task-001")):
        assert (again.status_code, again.json()["error"]) == (404, "task_not_found")
    assert [task["id"] for task in api.get("/api/v1/tasks").json()["tasks"]] == ["task-002"]


def test_task_that_has_not_ended_is_not_deleted(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    response = api.delete(PATH)
    problem = response.json()
    assert (response.status_code, problem["error"], problem["task_state"]) == (409, "task_not_ended", "running")
    assert problem["message"] == "Task task-001 is running; wait for it to end or cancel it, then delete it."
    assert api.get("/api/v1/tasks/task-001").status_code == 200


def test_viewer_cannot_delete_a_task(api_with_tokens, tasks):
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    api = api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))
    assert api.delete(PATH, headers={"authorization": "Bearer vera"}).status_code == 403
    assert api.delete(PATH, headers={"authorization": "Bearer olga"}).status_code == 200


def test_only_the_delete_method_is_allowed(api, tasks):
    tasks.add("task-001")
    response = api.get(PATH)
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE")
