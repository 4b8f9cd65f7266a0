"""Tasks on workers that the `processes` engine starts, with a real server, real runners and a scripted model."""

import base64
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from doubles.cluster_deployment import LEASE_SECONDS, ClusterDeployment, kill
from doubles.deployment import SERVER_KEY, bash_turn, reply_turn, wait_until
from doubles.remote_deployment import MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, closing_deployment
from sandbox import __version__
from sandbox.demo.scripted_model import Fault, Turn
from sandbox.placements.cluster.claim_and_takeover_rules import LEASE_MARGIN_SECONDS
from sandbox.worker.worker import EXIT_DISMISSED

HEARTBEAT_SECONDS = 3


@pytest.fixture
def deploy(tmp_path):
    with closing_deployment(ClusterDeployment(tmp_path)) as start:
        yield start


@pytest.mark.timeout(240)
def test_task_runs_on_a_worker_and_the_worker_exits(deploy):
    deployment = deploy(MAKE_FILE_TURN, reply_turn())
    deployment.submit()
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    [started] = deployment.attempts()
    assert started.host == f"cluster:{socket.gethostname()}"
    [job] = deployment.jobs()
    assert job.name == f"sandbox-{started.attempt_id}"
    log = deployment.data_dir / "tasks" / "task-1" / "attempts" / started.attempt_id / "runner.log"
    wait_until(lambda: log.exists() and "The attempt has ended" in log.read_text(), 30, description="the runner's log")
    deployment.wait_for_clean_exit(job)
    assert not (deployment.host_data_dir / "tasks" / "task-1").exists()
    assert list((deployment.data_dir / "cluster" / "jobs").iterdir()) == []


@pytest.mark.timeout(240)
def test_task_on_a_worker_survives_a_killed_server(deploy):
    """The worker and its runner continue, and the next server gets what was recorded in the meantime."""
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    wait_until(lambda: [host["state"] for host in deployment.hosts()] == ["idle"], 30, description="the engine's host")
    deployment.submit()
    deployment.wait_for_second_tool_call()
    runner, worker = deployment.runner_pid(), deployment.worker_pid()
    assert runner is not None
    assert worker is not None
    [host] = deployment.hosts()
    assert (host["name"], host["state"], host["task_ids"]) == (socket.gethostname(), "ready", ["task-1"])
    assert (host["cpus"], host["version"]) == (os.cpu_count(), __version__)
    deployment.restart_server(signal.SIGKILL)
    assert (deployment.runner_pid(), deployment.worker_pid()) == (runner, worker)
    wait_until(lambda: deployment.hosts()[0]["state"] == "ready", 30, description="the worker's connection")
    metrics = deployment.http.get("/metrics").text
    assert f'sandbox_host_tasks_running{{host="{socket.gethostname()}"}} 1.0' in metrics
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    wait_until(lambda: deployment.hosts()[0]["state"] == "idle", 30, description="the worker's end")
    assert deployment.hosts()[0]["task_ids"] == []
    patch = deployment.artifact("task-1.patch")
    assert b"+made\n" in patch
    assert b"+from-the-user\n" in patch
    assert len(deployment.attempts()) == 1
    deployment.wait_for_clean_exit(*deployment.jobs())


@pytest.mark.timeout(240)
def test_model_requests_wait_while_the_lease_is_expired(deploy):
    """The agent's next request comes after the lease has expired. The request is held until the server is back."""
    wait = f"mkfifo /tmp/gate; read -t {LEASE_SECONDS + 10} _ <> /tmp/gate"  # Claude Code rejects a long `sleep`
    deployment = deploy(MAKE_FILE_TURN, bash_turn(f"{wait}; echo late > late.txt"), reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    requests = deployment.count_model_requests()
    deployment.server.stop(signal.SIGKILL)
    time.sleep(LEASE_SECONDS + 17)
    assert deployment.count_model_requests() == requests
    deployment.start_server(ports=deployment.ports())
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert deployment.count_model_requests() > requests
    assert b"+late\n" in deployment.artifact("task-1.patch")
    assert len(deployment.attempts()) == 1


@pytest.mark.timeout(240)
def test_task_of_a_killed_worker_is_retried_by_another_worker(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit(lifecycle={"retries": 1})
    deployment.wait_for_second_tool_call()
    runner, worker = deployment.runner_pid(), deployment.worker_pid()
    kill(worker)
    wait_until(lambda: not Path(f"/proc/{runner}").exists(), 10, description="the runner's end")
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 4, 60, description="the second attempt")
    deployment.finish_second_command()
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    first, second = status["attempts"]
    assert first["error"]["code"] == "runner_lost"
    assert second.get("error") is None
    lost, next_job = deployment.jobs()
    assert deployment.exit_code(lost) == -signal.SIGKILL
    deployment.wait_for_clean_exit(next_job)
    assert not (deployment.host_data_dir / "tasks" / "task-1").exists()


@pytest.mark.timeout(240)
def test_next_worker_removes_leftovers_of_a_killed_worker(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    kill(deployment.worker_pid())
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost"), deployment.diagnostics()
    left = deployment.host_data_dir / "tasks" / "task-1"
    assert left.exists()
    deployment.submit("task-2")
    wait_until(lambda: not left.exists(), 60, description="the removal")
    assert str(left) not in Path("/proc/self/mounts").read_text()


@pytest.mark.timeout(240)
def test_cancelled_task_ends_on_its_worker(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    assert deployment.http.delete("/api/v1/tasks/task-1", timeout=60).status_code == 200
    assert deployment.wait()["state"] == "cancelled", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    deployment.wait_for_clean_exit(*deployment.jobs())


@pytest.mark.timeout(240)
def test_finisher_and_retry_of_a_killed_runner_run_on_the_same_worker(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit(lifecycle={"retries": 1})
    deployment.wait_for_second_tool_call()
    worker = deployment.worker_pid()
    kill(deployment.runner_pid())
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 4, 90, description="the second attempt")
    assert deployment.worker_pid() == worker
    deployment.finish_second_command()
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()
    assert [(attempt["error"] or {}).get("code") for attempt in status["attempts"]] == ["runner_lost", None]
    assert b"+made\n" in deployment.artifact("task-1.patch")
    [job] = deployment.jobs()
    deployment.wait_for_clean_exit(job)


@pytest.mark.timeout(240)
def test_preserved_sandbox_keeps_its_worker(deploy):
    deployment = deploy(
        bash_turn("echo kept > kept.txt"),
        Turn(faults=(Fault("error", status=400, times=9),)),
        reply_turn("never reached"),
    )
    deployment.submit(lifecycle={"failure_action": "preserve"})
    assert deployment.wait()["state"] == "failed_preserved", deployment.diagnostics()
    deployment.restart_server(signal.SIGKILL)
    wait_until(lambda: deployment.status()["sandbox_kept"], 30, description="the preserved sandbox")
    deployment.check_preserved_file()
    [job] = deployment.jobs()
    assert deployment.exit_code(job) is None
    deployment.release()
    deployment.wait_for_clean_exit(job)


@pytest.mark.timeout(300)
def test_task_of_a_lost_host_is_retried_after_the_lease(deploy):
    """A worker that is stopped together with its runner is silent. After the lease, the engine cancels its job."""
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit(lifecycle={"retries": 1})
    deployment.wait_for_second_tool_call()
    runner, worker = deployment.runner_pid(), deployment.worker_pid()
    deployment.signal(signal.SIGSTOP, worker, runner)
    stopped_at = time.monotonic()
    wait_until(lambda: len(deployment.attempts()) == 2, 120, description="the second attempt")
    assert time.monotonic() - stopped_at > LEASE_SECONDS + LEASE_MARGIN_SECONDS - HEARTBEAT_SECONDS
    assert deployment.status()["attempts"][0]["error"]["code"] == "host_lost"
    lost, _ = deployment.jobs()
    assert deployment.exit_code(lost) == 143
    assert not Path(f"/proc/{runner}").exists()
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 4, 90, description="the second attempt")
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()


@pytest.mark.timeout(240)
def test_terminated_worker_sends_the_last_records_and_exits_with_an_error(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    runner, worker = deployment.runner_pid(), deployment.worker_pid()
    deployment.signal(signal.SIGTERM, worker)
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost"), deployment.diagnostics()
    assert not Path(f"/proc/{runner}").exists()
    [job] = deployment.jobs()
    wait_until(lambda: deployment.exit_code(job) is not None, 30, description="the worker's end")
    assert deployment.exit_code(job) == 143, deployment.diagnostics()
    assert not (deployment.host_data_dir / "tasks" / "task-1").exists()


def write_host_key(path, key):
    path.write_bytes(base64.b64encode(key))
    path.chmod(0o600)


@pytest.mark.timeout(240)
def test_worker_without_the_key_of_the_server_gets_no_task_until_the_key_is_corrected(deploy, tmp_path):
    deployment = deploy(MAKE_FILE_TURN, reply_turn())
    path, key = tmp_path / "host.key", os.urandom(32)
    write_host_key(path, key)
    deployment.server.stop()
    deployment.start_server(SANDBOX_CLUSTER_HOST_KEY_FILE=str(path))
    write_host_key(path, os.urandom(32))
    deployment.submit()

    def message():
        return deployment.status()["state_message"]

    host = socket.gethostname()
    reason = f"The host {host} has a different key than the server: check cluster.host_key_file on both."
    wait_until(lambda: reason in message(), 60, description="the reason")
    wait_until(lambda: "another one will be started after a pause" in message(), 30, description="the next job")
    assert reason in message()
    assert reason in deployment.status()["job"]["reason"]
    assert deployment.attempts() == []
    write_host_key(path, key)
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    first, *_, last = deployment.jobs()
    assert deployment.exit_code(first) == EXIT_DISMISSED
    deployment.wait_for_clean_exit(last)
    stored = [path for path in deployment.data_dir.rglob("*") if is_server_or_worker_file(path)]
    for encoding in (key, base64.b64encode(key), key.hex().encode()):
        assert not [path for path in stored if encoding in path.read_bytes()]


OTHER_VERSION = "99.0.0"
OTHER_PYTHON = f"""#!/bin/sh
exec {sys.executable} -c '
import runpy, sys
import sandbox
sandbox.__version__ = "{OTHER_VERSION}"
sys.argv = sys.argv[2:]
runpy.run_module("sandbox", run_name="__main__", alter_sys=True)
' "$@"
"""
"""A Python interpreter in which Sandbox has another version. `-m` and a module must be its first arguments."""


@pytest.mark.timeout(240)
def test_worker_of_another_version_gets_no_task_until_the_server_is_restarted(deploy, tmp_path):
    """The installation was replaced while the server was running. A task that is running at that time continues."""
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    python = tmp_path / "python"
    python.write_text(OTHER_PYTHON)
    python.chmod(0o755)
    ports = deployment.ports()
    deployment.server.stop()
    deployment.start_server(ports=ports, python=str(python))
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert len(deployment.attempts()) == 1
    deployment.submit("task-2")
    host = socket.gethostname()
    reason = (
        f"The host {host} has Sandbox {__version__}, and the server has Sandbox {OTHER_VERSION}. Install Sandbox "
        f"{OTHER_VERSION} on {host}, or restart the server if it was upgraded."
    )
    wait_until(lambda: reason in deployment.status("task-2")["state_message"], 60, description="the reason")
    assert reason in (deployment.host_data_dir / "worker.log").read_text()
    deployment.server.stop()
    deployment.start_server(ports=ports)
    wait_until(lambda: deployment.status("task-2")["progress"]["tool_calls"] == 2, 90, description="the tool call")
    assert deployment.http.delete("/api/v1/tasks/task-2", timeout=60).status_code == 200
    assert deployment.wait("task-2")["state"] == "cancelled", deployment.diagnostics("task-2")


SECRET = "secret-value-of-the-task-0123456789"


@pytest.mark.timeout(240)
def test_nothing_that_an_engine_stores_contains_keys_or_secrets(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.server.stop()
    deployment.start_server(TOKEN=SECRET)
    deployment.submit(secrets=[{"name": "TOKEN", "source": "env", "key": "TOKEN"}])
    deployment.wait_for_second_tool_call()
    [worker], [job] = deployment.worker_pids(), deployment.jobs()
    supervisor = json.loads((job / "started.json").read_bytes())["pid"]
    places = [
        *(Path(f"/proc/{pid}/{name}") for pid in (worker, supervisor) for name in ("cmdline", "environ")),
        *(path for path in (deployment.data_dir / "cluster").rglob("*") if is_server_or_worker_file(path)),
    ]
    assert job / "request.json" in places
    assert find_values(places) == []
    planted = job / "planted"
    planted.write_text(f"x{SERVER_KEY}y{SECRET}z")
    assert find_values([*places, planted]) == [planted] * 2
    planted.unlink()
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()


def is_server_or_worker_file(path):
    """Return whether a file is stored by the engine, the server or the worker, not on the disk of the sandbox."""
    return path.is_file() and not {"disk", "disk.img", "agent", "profiles"} & set(path.parts)


def find_values(paths):
    """Return each file that contains the model key or the secret, once for each value."""
    return [path for path in paths for value in (SERVER_KEY, SECRET) if value.encode() in path.read_bytes()]


@pytest.mark.timeout(240)
def test_tasks_wait_while_the_only_host_is_drained(deploy):
    """The task that is running on the host continues, even across a restart of the server."""
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    [host] = deployment.hosts()
    assert (host["name"], host["state"], host["last_contact_at"]) == (socket.gethostname(), "idle", None)
    assert host["cpus"] > 0
    deployment.submit()
    deployment.wait_for_second_tool_call()
    drain = f"/api/v1/hosts/{host['name']}/drain"
    assert deployment.http.post(drain).json()["task_ids"] == ["task-1"]
    deployment.restart_server(signal.SIGKILL)
    deployment.submit("task-2")
    reason = f"Waiting for a host: No host is left for the job: the only host, {host['name']}, is excluded."
    wait_until(lambda: deployment.status("task-2")["state_message"].startswith(reason), 60, description="the reason")
    assert deployment.hosts()[0]["draining_since"] is not None
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert deployment.status("task-2")["state"] == "pending"
    assert deployment.http.delete(drain).json()["draining_since"] is None
    wait_until(lambda: deployment.status("task-2")["progress"]["tool_calls"] == 2, 90, description="the tool call")
