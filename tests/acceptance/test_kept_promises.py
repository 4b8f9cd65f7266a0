"""What the server promises to callers who went away: one task a key, secrets for runners only, sandboxes for a time."""

import subprocess

from doubles.live import bash, says, until
from sandbox.demo.model_script import Fault, Turn

VALUE = "a-value-that-nobody-may-read"


def test_a_key_outlives_the_server(world):
    machine = world(says())
    body = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task"},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
    }
    key = {"Idempotency-Key": "order-66"}
    first = machine.http.post("/api/v1/tasks", json=body, headers=key)
    machine.server.stop()
    machine.start_server()
    again = machine.http.post("/api/v1/tasks", json=body, headers=key)
    other = machine.http.post("/api/v1/tasks", json={**body, "claude": {"prompt": "Else."}}, headers=key)

    assert (first.status_code, again.status_code, other.status_code) == (202, 202, 422)
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert machine.http.get("/api/v1/tasks").json()["total_count"] == 1
    machine.wait(first.json()["task_id"])


def test_a_secret_reaches_the_agent_and_no_file_of_the_server(world):
    machine = world(bash('echo "$TOKEN" | wc -c; echo "$TOKEN"'), says())
    machine.server.stop()
    machine.start_server(SERVER_TOKEN=VALUE)
    machine.submit(secrets=[{"name": "TOKEN", "source": "env", "key": "SERVER_TOKEN"}])
    assert machine.wait()["state"] == "completed", machine.tell()
    [told] = machine.tool_results()
    assert str(len(VALUE) + 1) in str(told)
    logs = machine.http.get("/api/v1/tasks/task-1/logs").text
    assert "[REDACTED:TOKEN]" in logs
    written = b"".join(file.read_bytes() for file in machine.data_dir.rglob("*") if file.is_file())
    assert VALUE.encode() not in written
    machine.submit("task-2", secrets=[{"name": "TOKEN", "source": "env", "key": "NOT_SET"}])
    failed = machine.wait("task-2")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "secret_unavailable")
    assert "NOT_SET" in failed["error"]["message"]
    assert machine.states("task-2") == ["pending", "failed"]


def read_kept(disk, name):
    """A file of a preserved sandbox, whose disk is a file system in a file where the machine can mount one."""
    image = disk.with_suffix(".img")
    if not image.exists():
        return (disk / name).read_text()
    read = ["debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(read, capture_output=True, text=True, timeout=10, check=True).stdout


def test_a_preserved_sandbox_goes_when_its_time_is_over(world):
    machine = world(bash("echo half > half.txt"), Turn(faults=(Fault("error", status=400, times=9),)))
    machine.submit(lifecycle={"failure_action": "preserve"})
    assert machine.wait()["state"] == "failed_preserved", machine.tell()
    [disk] = machine.data_dir.glob("tasks/task-1/attempts/*/disk")
    assert read_kept(disk, "workspace/half.txt") == "half\n"
    machine.server.stop()
    machine.start_server()
    assert disk.exists()
    machine.server.stop()
    machine.start_server(SANDBOX_PRESERVE_TIME_TO_LIVE="1s")
    until(lambda: not disk.exists(), 10, "the janitor")
    assert machine.http.delete("/api/v1/tasks/task-1/vm").status_code == 404
