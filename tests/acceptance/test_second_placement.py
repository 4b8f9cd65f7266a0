"""A second placement: a host with its own data directory, reached only through the socket of a worker on that host."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from doubles import worker_placement
from doubles.deployment import (
    SERVER_KEY,
    Deployment,
    bash_turn,
    make_repository,
    preinstall_agent,
    reply_turn,
    wait_until,
)
from doubles.runner_processes import find_runner
from doubles.terminal_user import TerminalUser
from sandbox.demo.model_script import Fault, Turn

PACKAGE = Path(worker_placement.__file__).parent
MAKE_FILE, WAIT_FOR_FIFO = (
    bash_turn("echo made > made.txt"),
    bash_turn("mkfifo /tmp/gate && read _ < /tmp/gate; cat answer.txt"),
)
SHELL = ("task", "shell", "task-1")


class WorkerDeployment(Deployment):
    """A deployment whose tasks run on a worker, which has its own data directory and survives server restarts."""

    def start_worker(self):
        self.worker_data_dir, self.worker_socket = self.directory / "worker", self.directory / "worker.sock"
        preinstall_agent(self.worker_data_dir)
        settings = json.dumps({"data_dir": str(self.worker_data_dir)})
        command = [sys.executable, str(PACKAGE / "worker.py"), settings, str(self.worker_socket)]
        self.worker = self._start("worker", command, {"SANDBOX_RUNTIME": self.runtime}, ())

    def start_server(self):
        if not self.data_dir.exists():
            preinstall_agent(self.data_dir)
        settings = {"host": "127.0.0.1", "port": "0", "ws_port": "0", "data_dir": str(self.data_dir)}
        model = {"ANTHROPIC_BASE_URL": self.model_url, "ANTHROPIC_API_KEY": SERVER_KEY}
        command = [sys.executable, str(PACKAGE / "server.py"), json.dumps(settings), str(self.worker_socket)]
        self.server = self._start("server", command, {"SANDBOX_RUNTIME": self.runtime, **model}, ())
        if self.http is not None:
            self.http.close()
        self.http = self._client()
        wait_until(lambda: self.http.get("/api/v1/health").json()["ready"], description="the worker's first report")

    def restart_server(self, signal_number=signal.SIGKILL):
        self.server.stop(signal_number)
        self.start_server()

    def runner_pid(self):
        return find_runner(self.worker_data_dir, "task-1")

    def wait_for_second_call(self):
        wait_until(lambda: self.status()["progress"]["tool_calls"] == 2, 60, description="the second tool call")

    def open_shell(self):
        return TerminalUser(*SHELL, server=self.server.ready_message["http"])

    def files_below(self, data_dir):
        """Return the relative paths of the files in the task's directory."""
        root = data_dir / "tasks" / "task-1"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def diagnostics(self, task_id="task-1"):
        logs = "".join(path.read_text() for path in self.worker_data_dir.glob("tasks/*/attempts/*/runner.log"))
        return f"{super().diagnostics(task_id)}\n{logs}"


@pytest.fixture
def deploy(tmp_path):
    deployment = WorkerDeployment(tmp_path)

    def start(*turns):
        make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
        deployment.start_git()
        deployment.start_model(*turns)
        deployment.start_worker()
        deployment.start_server()
        return deployment

    yield start
    deployment.close()


@pytest.mark.timeout(240)
def test_task_survives_a_server_restart_and_an_unresponsive_worker(deploy):
    deployment = deploy(MAKE_FILE, WAIT_FOR_FIFO, reply_turn())
    deployment.submit()
    deployment.wait_for_second_call()
    runner = deployment.runner_pid()
    assert runner is not None
    deployment.restart_server()
    check_silence(deployment)
    assert deployment.runner_pid() == runner
    terminal = deployment.open_shell()
    terminal.expect(r"\$ ")
    terminal.type("echo from-the-user > answer.txt; echo > /tmp/gate; exit 7\n")
    assert terminal.exit_code() == 7
    terminal.close()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    check_copy(deployment)


def check_silence(deployment):
    """Check that the server makes no decision about the runner while the worker does not respond."""
    deployment.worker.send_signal(signal.SIGSTOP)
    message = "The runner's host does not respond; the task's current state is unknown."
    wait_until(lambda: deployment.status()["state_message"] == message, 30, description="the message")
    health = deployment.http.get("/api/v1/health").json()
    assert not health["ready"]
    assert "does not respond" in " ".join(health["reasons"])
    deployment.worker.send_signal(signal.SIGCONT)
    wait_until(lambda: deployment.status()["state_message"] != message, description="the task's state")
    assert deployment.status()["state"] == "running"


def check_copy(deployment):
    """Check that the server has a copy of the journal and the artifacts, and no other files of the attempt."""
    patch = deployment.artifact("task-1.patch")
    assert b"+made\n" in patch
    assert b"+from-the-user\n" in patch
    records = Path("tasks", "task-1", "journal", "records")
    assert (deployment.data_dir / records).read_bytes() == (deployment.worker_data_dir / records).read_bytes()
    found = deployment.files_below(deployment.data_dir)
    assert {Path(name).parts[0] for name in found} == {"journal", "artifacts"}
    assert {name for name in found if name.startswith("artifacts/")} == {
        f"artifacts/{name}" for name in {*deployment.artifact_names(), "agent-session.gz"}
    }
    [attempt] = deployment.status()["attempts"]
    assert f"attempts/{attempt['id']}/runner.log" in deployment.files_below(deployment.worker_data_dir)


@pytest.mark.timeout(240)
def test_cancelled_task_ends_on_the_worker(deploy):
    deployment = deploy(MAKE_FILE, WAIT_FOR_FIFO, reply_turn())
    deployment.submit()
    deployment.wait_for_second_call()
    cancel = partial(deployment.http.delete, "/api/v1/tasks/task-1", timeout=60)
    deployment.worker.send_signal(signal.SIGSTOP)
    rejected = cancel()
    assert (rejected.status_code, rejected.json()["error"]) == (503, "service_unavailable"), rejected.text
    deployment.worker.send_signal(signal.SIGCONT)
    # The worker may have received the rejected request.
    assert cancel().status_code in {200, 409}
    assert deployment.wait()["state"] == "cancelled", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    wait_until(lambda: deployment.runner_pid() is None, description="the runner's end")


@pytest.mark.timeout(240)
def test_finisher_of_a_killed_runner_runs_on_the_worker(deploy):
    deployment = deploy(MAKE_FILE, WAIT_FOR_FIFO, reply_turn())
    deployment.submit()
    deployment.wait_for_second_call()
    os.kill(deployment.runner_pid(), signal.SIGKILL)
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost"), deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")


@pytest.mark.timeout(240)
def test_sandbox_is_preserved_on_the_worker(deploy):
    deployment = deploy(
        bash_turn("echo kept > kept.txt"),
        Turn(faults=(Fault("error", status=400, times=9),)),
        reply_turn("never reached"),
    )
    deployment.submit(lifecycle={"failure_action": "preserve"})
    assert deployment.wait()["state"] == "failed_preserved", deployment.diagnostics()
    deployment.restart_server()
    terminal = deployment.open_shell()
    terminal.expect(r"\$ ")
    terminal.type("cat kept.txt; exit 3\n")
    terminal.expect("kept\r\n")
    assert terminal.exit_code() == 3
    terminal.close()
    release = partial(deployment.http.delete, "/api/v1/tasks/task-1/vm", timeout=30)
    deployment.worker.send_signal(signal.SIGSTOP)
    assert deployment.status()["sandbox_kept"]
    assert release().status_code == 503
    deployment.worker.send_signal(signal.SIGCONT)
    wait_until(lambda: release().status_code in {200, 404}, 30, description="the release")
    assert not deployment.status()["sandbox_kept"]
    root = deployment.worker_data_dir / "tasks" / "task-1" / "attempts"
    assert [path.name for path in root.glob("*/*")] == ["runner.log"]
