"""A server can have more pending tasks than its limit on open files."""

from doubles.deployment import make_repository, wait_until
from doubles.fake_agent import make_fake_agent

LOW_DESCRIPTOR_LIMIT_PREFIX = ("sh", "-c", 'ulimit -Sn 64 && exec "$@"', "sh")


def test_many_tasks_queue_under_a_low_descriptor_limit(deployment, tmp_path):
    make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
    deployment.start_git()
    deployment.start_model()
    deployment.command_prefix = LOW_DESCRIPTOR_LIMIT_PREFIX
    deployment.start_server(PYTHONPATH=str(make_fake_agent(tmp_path / "agent", [('{"type": "assistant"}', 300.0)])))
    deployment.submit("first", vm={"cpus": 16})
    for number in range(60):
        deployment.submit(f"task-{number}")
    assert deployment.http.get("/api/v1/tasks?state=pending&limit=1").json()["total_count"] == 60
    for number in range(60):
        deployment.http.delete(f"/api/v1/tasks/task-{number}")
    query = "/api/v1/tasks?state=cancelled&limit=1"
    wait_until(lambda: deployment.http.get(query).json()["total_count"] == 60, description="all tasks to be cancelled")
