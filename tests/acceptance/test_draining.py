"""Servers that are stopped or drained: what runs goes on, what waits is there afterwards, and nobody waits long."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from doubles.live_server import make_repository, until
from doubles.stand_in_agent import make_stand_in

STEPS = [(json.dumps({"type": "assistant", "number": number}), 0.1) for number in range(30)]


@pytest.fixture
def machine(empty_world, tmp_path):
    """A server whose agents count to thirty in three seconds, and whose Vault takes connections and says nothing."""
    make_repository(empty_world.repositories / "repo.git", {"README.md": "# Hi\n"})
    empty_world.start_git()
    empty_world.start_model()
    with socket.create_server(("127.0.0.1", 0)) as vault:
        vault.settimeout(10)
        empty_world.vault = vault
        empty_world.settings = {
            "PYTHONPATH": str(make_stand_in(tmp_path / "agent", STEPS)),
            "SANDBOX_SECRETS_VAULT_ADDRESS": f"http://127.0.0.1:{vault.getsockname()[1]}",
            "VAULT_TOKEN": "t",
        }
        empty_world.start_server(**empty_world.settings)
        yield empty_world


def admin(machine, *words):
    command = [sys.executable, "-m", "sandbox", "admin", *words, "--server", machine.server.said["http"]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_drained_server_finishes_what_runs_and_one_that_is_told_twice_to_end_waits_for_nobody(machine):
    since = drain(machine)
    machine.server.stop(signal.SIGKILL)
    machine.start_server(**machine.settings)
    undo_the_drain(machine, since)
    end_while_a_vault_hangs(machine)


def drain(machine):
    machine.submit("running")
    machine.until_state("running", "running")
    late = admin(machine, "drain", "--wait", "--timeout", "1s")
    assert late.returncode == 7
    assert "1 task still running after 1" in late.stderr
    refused = machine.http.post("/api/v1/tasks", json={})
    assert refused.status_code == 400  # mistakes are told all the same
    ready = machine.http.get("/api/v1/health/ready")
    assert (ready.status_code, "being drained" in ready.json()["message"]) == (503, True)
    done = admin(machine, "drain", "--wait", "--timeout", "1m", "--format", "json")
    assert (done.returncode, json.loads(done.stdout)["running"]) == (0, 0)
    assert machine.status("running")["state"] == "completed"
    with pytest.raises(AssertionError, match="being drained"):
        machine.submit("refused")
    return json.loads(done.stdout)["since"]


def undo_the_drain(machine, since):
    """It outlived the server."""
    assert machine.http.get("/api/v1/health").json()["draining_since"] == since
    assert machine.http.get("/api/v1/health/ready").status_code == 503
    assert admin(machine, "drain", "--undo").returncode == 0
    assert machine.http.get("/api/v1/health/ready").status_code == 200


def end_while_a_vault_hangs(machine):
    machine.submit("taken")
    machine.until_state("running", "taken")
    machine.submit("asking", secrets=[{"name": "A_SECRET", "source": "vault", "key": "a#b"}])
    asked, _ = machine.vault.accept()
    begin = time.monotonic()
    machine.server.tell(signal.SIGTERM)
    machine.server.tell(signal.SIGTERM)
    machine.server.stop(signal.SIGTERM, seconds=20)
    assert time.monotonic() - begin < 5  # 2 on a machine that does nothing else; a Vault may take 10
    asked.close()
    machine.start_server(**machine.settings)
    assert machine.wait("taken")["state"] == "completed"
    assert machine.status("asking")["state"] == "pending"
    machine.vault.close()
    assert machine.logs("taken", "stdout").count('"number"') == len(STEPS)
    until(lambda: machine.status("asking")["state"] == "failed", 30, "the Vault to be given up")
    assert machine.status("asking")["error"]["code"] == "secret_unavailable"
