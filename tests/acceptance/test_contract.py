"""What the server promises to callers who went away: one task a key, secrets for runners only, sandboxes for a time."""

import subprocess
from datetime import UTC, datetime, timedelta

from doubles.live_server import bash, make_repository, until
from sandbox.demo.model_script import Fault, Turn

VALUE = "a-value-that-nobody-may-read"


def read_kept(disk, name):
    """A file of a preserved sandbox, whose disk is a file system in a file where the machine can mount one."""
    image = disk.with_suffix(".img")
    if not image.exists():
        return (disk / name).read_text()
    read = ["debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(read, capture_output=True, text=True, timeout=10, check=True).stdout


def test_every_promise_outlives_its_server(empty_world):
    machine = empty_world
    make_repository(machine.repositories / "repo.git", {"README.md": "# Hi\n"})
    machine.start_git()
    look = bash('echo "$TOKEN" | wc -c; echo "$TOKEN"; echo half > half.txt')
    machine.start_model(look, Turn(faults=(Fault("error", status=400, times=99),)))
    machine.start_server(SERVER_TOKEN=VALUE)
    keep_a_secret(machine)

    first = order(machine, "Do it.")
    assert machine.wait("kept")["state"] == "failed_preserved", machine.tell("kept")
    [disk] = machine.data_dir.glob("tasks/kept/attempts/*/disk")
    assert read_kept(disk, "workspace/half.txt") == "half\n"
    machine.server.stop()
    machine.start_server()
    assert disk.exists()
    again, other = order(machine, "Do it."), order(machine, "Else.")
    assert (first.status_code, again.status_code, other.status_code) == (202, 202, 422)
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert machine.http.get("/api/v1/tasks").json()["total_count"] == 3
    finished_at = datetime.fromisoformat(machine.status("kept")["finished_at"])
    machine.server.stop()
    # The janitor looks when a server starts, and then for minutes no more.
    until(lambda: datetime.now(UTC) - finished_at > timedelta(seconds=1), what="its time to be over")
    machine.start_server(SANDBOX_PRESERVE_TIME_TO_LIVE="1s")
    until(lambda: not disk.exists(), 10, "the janitor")
    assert machine.http.delete("/api/v1/tasks/kept/vm").status_code == 404


def keep_a_secret(machine):
    """It reaches the agent and no file of the server."""
    machine.submit(secrets=[{"name": "TOKEN", "source": "env", "key": "SERVER_TOKEN"}])
    assert machine.wait()["error"]["code"] == "agent_failed", machine.tell()
    [told] = machine.tool_results()
    assert str(len(VALUE) + 1) in str(told)
    assert "[REDACTED:TOKEN]" in machine.logs()
    agent = machine.data_dir / "agent"  # 400 MB that were there before
    files = [file for file in machine.data_dir.rglob("*") if file.is_file() and agent not in file.parents]
    assert not [file for file in files if VALUE.encode() in file.read_bytes()]
    machine.submit("task-2", secrets=[{"name": "TOKEN", "source": "env", "key": "NOT_SET"}])
    failed = machine.wait("task-2")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "secret_unavailable")
    assert "NOT_SET" in failed["error"]["message"]
    assert machine.states("task-2") == ["pending", "failed"]


def order(machine, prompt):
    """Submit the task that is kept, under one key."""
    body = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task", "id": "kept"},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
        "claude": {"prompt": prompt},
        "lifecycle": {"failure_action": "preserve"},
    }
    return machine.http.post("/api/v1/tasks", json=body, headers={"Idempotency-Key": "order-66"})
