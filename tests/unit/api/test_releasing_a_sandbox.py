"""Somebody is done with what a failed task left."""


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
