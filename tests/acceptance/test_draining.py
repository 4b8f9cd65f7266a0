"""When a server is drained or stopped, running tasks continue, pending tasks stay queued, and shutdown is fast."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from doubles.deployment import make_repository, wait_until
from doubles.fake_agent import make_fake_agent

TIMED_LINES = [(json.dumps({"type": "assistant", "number": number}), 0.1) for number in range(30)]


@pytest.fixture
def deployment(deployment, tmp_path):
    """A server whose agents count to thirty in three seconds, and whose Vault is not responding."""
    make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
    deployment.start_git()
    deployment.start_model()
    with socket.create_server(("127.0.0.1", 0)) as vault:
        vault.settimeout(10)
        deployment.vault = vault
        deployment.settings = {
            "PYTHONPATH": str(make_fake_agent(tmp_path / "agent", TIMED_LINES)),
            "SANDBOX_SECRETS_VAULT_ADDRESS": f"http://127.0.0.1:{vault.getsockname()[1]}",
            "VAULT_TOKEN": "t",
        }
        deployment.start_server(**deployment.settings)
        yield deployment


def admin(deployment, *arguments):
    command = [
        sys.executable,
        "-m",
        "sandbox",
        "admin",
        *arguments,
        "--server",
        deployment.server.ready_message["http"],
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_drain_finishes_running_tasks_and_second_sigterm_ends_the_server(deployment):
    since = check_drain(deployment)
    deployment.server.stop(signal.SIGKILL)
    deployment.start_server(**deployment.settings)
    check_undo_drain(deployment, since)
    check_shutdown_during_secret_lookup(deployment)


def check_drain(deployment):
    deployment.submit("running")
    deployment.wait_for_state("running", "running")
    timed_out = admin(deployment, "drain", "--wait", "--timeout", "1s")
    assert timed_out.returncode == 7
    assert "1 task still running after 1" in timed_out.stderr
    rejected = deployment.http.post("/api/v1/tasks", json={})
    assert rejected.status_code == 400  # validation errors are still reported
    ready = deployment.http.get("/api/v1/health/ready")
    assert (ready.status_code, "being drained" in ready.json()["message"]) == (503, True)
    done = admin(deployment, "drain", "--wait", "--timeout", "1m", "--format", "json")
    assert (done.returncode, json.loads(done.stdout)["running"]) == (0, 0)
    assert deployment.status("running")["state"] == "completed"
    with pytest.raises(AssertionError, match="being drained"):
        deployment.submit("refused")
    return json.loads(done.stdout)["since"]


def check_undo_drain(deployment, since):
    """Check that the server keeps draining after a restart, until the drain is undone."""
    assert deployment.http.get("/api/v1/health").json()["draining_since"] == since
    assert deployment.http.get("/api/v1/health/ready").status_code == 503
    assert admin(deployment, "drain", "--undo").returncode == 0
    assert deployment.http.get("/api/v1/health/ready").status_code == 200


def check_shutdown_during_secret_lookup(deployment):
    deployment.submit("launched")
    deployment.wait_for_state("running", "launched")
    deployment.submit("resolving", secrets=[{"name": "A_SECRET", "source": "vault", "key": "a#b"}])
    connection, _ = deployment.vault.accept()
    started_at = time.monotonic()
    deployment.server.send_signal(signal.SIGTERM)
    deployment.server.send_signal(signal.SIGTERM)
    deployment.server.stop(signal.SIGTERM, seconds=20)
    assert time.monotonic() - started_at < 5  # about 2 s on an idle machine; the Vault timeout is 10 s
    connection.close()
    deployment.start_server(**deployment.settings)
    assert deployment.wait("launched")["state"] == "completed"
    assert deployment.status("resolving")["state"] == "pending"
    deployment.vault.close()
    assert deployment.logs("launched", "stdout").count('"number"') == len(TIMED_LINES)
    wait_until(lambda: deployment.status("resolving")["state"] == "failed", 30, "the Vault request to time out")
    assert deployment.status("resolving")["error"]["code"] == "secret_unavailable"
