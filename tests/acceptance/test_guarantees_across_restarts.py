"""Idempotency keys and preserved sandboxes with a time to live survive server restarts; secrets are not stored."""

import subprocess
from datetime import UTC, datetime, timedelta

from doubles.deployment import bash_turn, make_repository, wait_until
from sandbox.demo.scripted_model import Fault, Turn

VALUE = "a-value-that-nobody-may-read"


def read_preserved_file(disk, name):
    """Read a file in a preserved sandbox. Its disk is an image file if the machine supports loop devices."""
    image = disk.with_suffix(".img")
    if not image.exists():
        return (disk / name).read_text()
    read = ["debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(read, capture_output=True, text=True, timeout=10, check=True).stdout


def test_idempotency_keys_and_preserved_sandboxes_survive_a_restart(deployment):
    make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
    deployment.start_git()
    print_secret = bash_turn('echo "$TOKEN" | wc -c; echo "$TOKEN"; echo half > half.txt')
    deployment.start_model(print_secret, Turn(faults=(Fault("error", status=400, times=99),)))
    deployment.start_server(SERVER_TOKEN=VALUE)
    check_secret_handling(deployment)

    first = submit_with_key(deployment, "Do it.")
    assert deployment.wait("kept")["state"] == "failed_preserved", deployment.diagnostics("kept")
    [disk] = deployment.data_dir.glob("tasks/kept/attempts/*/disk")
    assert read_preserved_file(disk, "workspace/half.txt") == "half\n"
    deployment.server.stop()
    deployment.start_server()
    assert disk.exists()
    second, other = submit_with_key(deployment, "Do it."), submit_with_key(deployment, "Else.")
    assert (first.status_code, second.status_code, other.status_code) == (202, 202, 422)
    assert second.json() == first.json()
    assert second.headers["Idempotent-Replayed"] == "true"
    assert deployment.http.get("/api/v1/tasks").json()["total_count"] == 3
    finished_at = datetime.fromisoformat(deployment.status("kept")["finished_at"])
    deployment.server.stop()
    # The janitor runs at server start, and then only every five minutes.
    wait_until(
        lambda: datetime.now(UTC) - finished_at > timedelta(seconds=1), description="the end of its time to live"
    )
    deployment.start_server(SANDBOX_PRESERVE_TIME_TO_LIVE="1s")
    wait_until(lambda: not disk.exists(), 10, "the janitor")
    assert deployment.http.delete("/api/v1/tasks/kept/vm").status_code == 404


def check_secret_handling(deployment):
    """Check that a secret reaches the agent but is not stored in any file of the server."""
    deployment.submit(secrets=[{"name": "TOKEN", "source": "env", "key": "SERVER_TOKEN"}])
    assert deployment.wait()["error"]["code"] == "agent_failed", deployment.diagnostics()
    [result] = deployment.tool_results()
    assert str(len(VALUE) + 1) in str(result)
    assert "[REDACTED:TOKEN]" in deployment.logs()
    agent = deployment.data_dir / "agent"  # contains only the copy of Claude Code: 400 MB that no task changes
    files = [file for file in deployment.data_dir.rglob("*") if file.is_file() and agent not in file.parents]
    assert not [file for file in files if VALUE.encode() in file.read_bytes()]
    deployment.submit("task-2", secrets=[{"name": "TOKEN", "source": "env", "key": "NOT_SET"}])
    status = deployment.wait("task-2")
    assert (status["state"], status["error"]["code"]) == ("failed", "secret_unavailable")
    assert "NOT_SET" in status["error"]["message"]
    assert deployment.states("task-2") == ["pending", "failed"]


def submit_with_key(deployment, prompt):
    """Submit the preserved task with a fixed idempotency key."""
    body = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task", "id": "kept"},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
        "claude": {"prompt": prompt},
        "lifecycle": {"failure_action": "preserve"},
    }
    return deployment.http.post("/api/v1/tasks", json=body, headers={"Idempotency-Key": "order-66"})
