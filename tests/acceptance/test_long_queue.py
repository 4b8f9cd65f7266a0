"""More tasks wait than the session that started the server may open files."""

from doubles.live_server import make_repository, until
from doubles.stand_in_agent import make_stand_in

FEW = ("sh", "-c", 'ulimit -Sn 64 && exec "$@"', "sh")


def test_a_session_with_few_descriptors_holds_many_waiting_tasks(empty_world, tmp_path):
    machine = empty_world
    make_repository(machine.repositories / "repo.git", {"README.md": "# Hi\n"})
    machine.start_git()
    machine.start_model()
    machine.prefix = FEW
    machine.start_server(PYTHONPATH=str(make_stand_in(tmp_path / "agent", [('{"type": "assistant"}', 300.0)])))
    machine.submit("first", vm={"cpus": 16})
    for number in range(60):
        machine.submit(f"task-{number}")
    assert machine.http.get("/api/v1/tasks?state=pending&limit=1").json()["total_count"] == 60
    for number in range(60):
        machine.http.delete(f"/api/v1/tasks/task-{number}")
    counted = "/api/v1/tasks?state=cancelled&limit=1"
    until(lambda: machine.http.get(counted).json()["total_count"] == 60, what="the end of all")
