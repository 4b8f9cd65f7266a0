"""More tasks wait than the session that started the server may open files."""

import resource

import pytest

from doubles.live import bash, says, until


@pytest.fixture
def few_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_session_with_few_descriptors_holds_many_waiting_tasks(world, few_descriptors):
    machine = world(bash("python3 -c 'import time; time.sleep(300)'"), says())
    machine.submit("first", vm={"cpus": 16})
    for number in range(60):
        machine.submit(f"task-{number}")
    assert machine.http.get("/api/v1/tasks?state=pending&limit=1").json()["total_count"] == 60
    for number in range(60):
        machine.http.delete(f"/api/v1/tasks/task-{number}")
    counted = "/api/v1/tasks?state=cancelled&limit=1"
    until(lambda: machine.http.get(counted).json()["total_count"] == 60, what="the end of all")
