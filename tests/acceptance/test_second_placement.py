"""A second placement: a host with its own data directory, reached only through the socket of a daemon on that host."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from doubles import daemon_placement
from doubles.deployment import SERVER_KEY, bash_turn, preinstall_agent, reply_turn, wait_until
from doubles.remote_deployment import MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, RemoteDeployment, closing_deployment
from sandbox.demo.scripted_model import Fault, Turn

PACKAGE = Path(daemon_placement.__file__).parent


class DaemonDeployment(RemoteDeployment):
    """A deployment whose tasks run on a daemon's host. The daemon has its own data directory and outlives servers."""

    def start_host(self):
        self.host_data_dir, self.daemon_socket = self.directory / "host", self.directory / "daemon.sock"
        preinstall_agent(self.host_data_dir)
        settings = json.dumps({"data_dir": str(self.host_data_dir)})
        command = [sys.executable, str(PACKAGE / "daemon.py"), settings, str(self.daemon_socket)]
        self.daemon = self._start("daemon", command, {"SANDBOX_RUNTIME": self.runtime}, ())

    def start_server(self):
        if not self.data_dir.exists():
            preinstall_agent(self.data_dir)
        settings = {"host": "127.0.0.1", "port": "0", "ws_port": "0", "data_dir": str(self.data_dir)}
        model = {"ANTHROPIC_BASE_URL": self.model_url, "ANTHROPIC_API_KEY": SERVER_KEY}
        command = [sys.executable, str(PACKAGE / "server.py"), json.dumps(settings), str(self.daemon_socket)]
        self.server = self._start("server", command, {"SANDBOX_RUNTIME": self.runtime, **model}, ())
        if self.http is not None:
            self.http.close()
        self.http = self._client()
        wait_until(lambda: self.http.get("/api/v1/health").json()["ready"], description="the daemon's first report")

    def restart_server(self, signal_number=signal.SIGKILL):
        self.server.stop(signal_number)
        self.start_server()

    def files_below(self, data_dir):
        """Return the relative paths of the files in the task's directory."""
        root = data_dir / "tasks" / "task-1"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def deploy(tmp_path):
    with closing_deployment(DaemonDeployment(tmp_path)) as start:
        yield start


@pytest.mark.timeout(240)
def test_task_survives_a_server_restart_and_an_unresponsive_host(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    runner = deployment.runner_pid()
    assert runner is not None
    deployment.restart_server()
    check_unresponsive_host(deployment)
    assert deployment.runner_pid() == runner
    deployment.finish_second_command()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    check_copy(deployment)


def check_unresponsive_host(deployment):
    """Check that the server makes no decision about the runner while the daemon is not responding."""
    deployment.daemon.send_signal(signal.SIGSTOP)
    message = "The runner's host is not responding; the task's current state is unknown."
    wait_until(lambda: deployment.status()["state_message"] == message, 30, description="the message")
    health = deployment.http.get("/api/v1/health").json()
    assert not health["ready"]
    assert "is not responding" in " ".join(health["reasons"])
    deployment.daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: deployment.status()["state_message"] != message, description="the task's state")
    assert deployment.status()["state"] == "running"


def check_copy(deployment):
    """Check that the server has a copy of the journal and the artifacts, and no other files of the attempt."""
    patch = deployment.artifact("task-1.patch")
    assert b"+made\n" in patch
    assert b"+from-the-user\n" in patch
    records = Path("tasks", "task-1", "journal", "records")
    assert (deployment.data_dir / records).read_bytes() == (deployment.host_data_dir / records).read_bytes()
    found = deployment.files_below(deployment.data_dir)
    assert {Path(name).parts[0] for name in found} == {"journal", "artifacts"}
    assert {name for name in found if name.startswith("artifacts/")} == {
        f"artifacts/{name}" for name in {*deployment.artifact_names(), "agent-session.gz"}
    }
    [attempt] = deployment.status()["attempts"]
    assert f"attempts/{attempt['id']}/runner.log" in deployment.files_below(deployment.host_data_dir)


@pytest.mark.timeout(240)
def test_cancelled_task_ends_on_its_host(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    cancel = partial(deployment.http.delete, "/api/v1/tasks/task-1", timeout=60)
    deployment.daemon.send_signal(signal.SIGSTOP)
    rejected = cancel()
    assert (rejected.status_code, rejected.json()["error"]) == (503, "service_unavailable"), rejected.text
    deployment.daemon.send_signal(signal.SIGCONT)
    # The daemon may carry out the rejected request after it continues, so the task may already have ended (409).
    assert cancel().status_code in {200, 409}
    assert deployment.wait()["state"] == "cancelled", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    wait_until(lambda: deployment.runner_pid() is None, description="the runner's end")


@pytest.mark.timeout(240)
def test_finisher_of_a_killed_runner_runs_on_its_host(deploy):
    deployment = deploy(MAKE_FILE_TURN, WAIT_FOR_FIFO_TURN, reply_turn())
    deployment.submit()
    deployment.wait_for_second_tool_call()
    os.kill(deployment.runner_pid(), signal.SIGKILL)
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost"), deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")


@pytest.mark.timeout(240)
def test_sandbox_is_preserved_on_its_host(deploy):
    deployment = deploy(
        bash_turn("echo kept > kept.txt"),
        Turn(faults=(Fault("error", status=400, times=9),)),
        reply_turn("never reached"),
    )
    deployment.submit(lifecycle={"failure_action": "preserve"})
    assert deployment.wait()["state"] == "failed_preserved", deployment.diagnostics()
    deployment.restart_server()
    deployment.check_preserved_file()
    deployment.daemon.send_signal(signal.SIGSTOP)
    assert deployment.status()["sandbox_kept"]
    assert deployment.request_release() == 503
    deployment.daemon.send_signal(signal.SIGCONT)
    deployment.release()
    root = deployment.host_data_dir / "tasks" / "task-1" / "attempts"
    assert [path.name for path in root.glob("*/*")] == ["runner.log"]
