"""An operator checks, backs up, prunes and restores a server while a task runs."""

import json
import os
import signal
import subprocess
import sys

import pytest

from doubles.deployment import make_repository, wait_until
from doubles.fake_agent import make_fake_agent
from doubles.forked_commands import run as forked


def check_deletion(deployment):
    """Delete one task with the command line, while another one is running."""
    deployment.submit("delete-me")
    deployment.wait_for_state("running", "delete-me", seconds=60)
    arguments = ("task", "delete", "delete-me", "--yes", "--server", deployment.server.ready_message["http"])
    refused = forked(*arguments, env={"HOME": str(deployment.home)})
    assert (refused.returncode, b"cancel it, then delete it" in refused.stderr) == (4, True)
    deployment.http.delete("/api/v1/tasks/delete-me?force=true")
    deployment.wait("delete-me")
    deleted = forked(*arguments, env={"HOME": str(deployment.home)})
    assert (deleted.returncode, deleted.stderr) == (0, b"Task delete-me was deleted.\n")
    assert not (deployment.data_dir / "tasks" / "delete-me").exists()
    for response in (
        deployment.http.get("/api/v1/tasks/delete-me"),
        deployment.http.delete("/api/v1/tasks/delete-me/data"),
    ):
        assert (response.status_code, response.json()["error"]) == (404, "task_not_found")


class StateFollower:
    """A client that follows the states of all tasks, and reconnects at the last received position."""

    def __init__(self, deployment):
        self._deployment, self.position, self.states = deployment, "", []

    def read_until(self, task_id, state):
        """Follow until this task has this state."""
        headers = {"Last-Event-ID": self.position} if self.position else {}
        with self._deployment.http.stream("GET", "/api/v1/events?follow=true", headers=headers) as response:
            for line in response.iter_lines():
                if line.startswith("id: "):
                    self.position = line[4:]
                elif line.startswith("data: ") and (event := json.loads(line[6:]))["type"] == "state_change":
                    self.states.append((event["task_id"], event["new_state"]))
                if (task_id, state) in self.states:
                    return
        raise AssertionError("the stream ended")


def test_states_of_all_tasks_are_followed_across_a_restart(deployment):
    follower = StateFollower(deployment)
    follower.position = deployment.http.get("/api/v1/events").text.strip().removeprefix("id: ")
    deployment.submit("first")
    follower.read_until("first", "running")
    deployment.restart_server(signal.SIGKILL)
    deployment.submit("second")
    deployment.http.delete("/api/v1/tasks/first?force=true")
    deployment.wait("first")
    deployment.wait_for_state("running", "second", seconds=60)
    follower.states.clear()
    follower.read_until("second", "running")
    assert [state for task_id, state in follower.states if task_id == "first"][-1] == "cancelled"
    deployment.http.delete("/api/v1/tasks/second?force=true")
    follower.read_until("second", "cancelled")


@pytest.fixture
def admin(deployment):
    """Runs `sandbox admin …` with the server and its data directory."""

    def run(command, *arguments, data_dir=None):
        location = [] if command == "prune" else ["--data-dir", str(data_dir or deployment.data_dir)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(deployment.home),
            "SANDBOX_SERVER": deployment.server.ready_message["http"],
        }  # fmt: skip
        argv = [sys.executable, "-m", "sandbox", "admin", command, *arguments, *location, "--format", "json"]
        done = subprocess.run(argv, capture_output=True, timeout=100, check=False, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


@pytest.fixture
def deployment(deployment, tmp_path):
    """A server whose agents run for ten minutes."""
    make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
    deployment.start_git()
    deployment.start_model()
    agent = make_fake_agent(tmp_path / "agent", [('{"type": "assistant"}', 600.0)])
    deployment.start_server(PYTHONPATH=str(agent))
    return deployment


def test_admin_commands_work_with_a_running_task(deployment, admin, tmp_path):
    deployment.submit("over")
    deployment.wait_for_state("running", "over", seconds=60)
    deployment.http.delete("/api/v1/tasks/over?force=true")
    deployment.wait("over")
    deployment.submit("working")
    deployment.wait_for_state("running", "working", seconds=60)

    file = tmp_path / "backup.tar"
    assert admin("backup", str(file))["remarks"] == []
    refused = forked("admin", "rebuild", "--data-dir", deployment.data_dir, env={"HOME": str(deployment.home)})
    assert refused.returncode == 4
    assert b"stop it" in refused.stderr

    pruned = wait_until(
        lambda: admin("prune", "--yes", "--older-than", "1s")["tasks"],
        description="the finished task is older than a second",
    )
    assert [task["id"] for task in pruned] == ["over"]
    for path in ("", "/logs", "/artifacts", "/artifacts/metadata.json"):
        response = deployment.http.get(f"/api/v1/tasks/over{path}")
        assert (response.status_code, response.json()["error"]) == (404, "task_not_found")
    assert [task["id"] for task in deployment.http.get("/api/v1/tasks").json()["tasks"]] == ["working"]
    assert deployment.status("working")["state"] == "running"
    assert admin("check", "--deep") == {"clean": True, "tasks": 1, "findings": []}

    check_deletion(deployment)
    assert admin("check", "--deep") == {"clean": True, "tasks": 1, "findings": []}

    new = tmp_path / "new"
    assert admin("restore", str(file), data_dir=new)["lost"] == ["working"]
    deployment.http.delete("/api/v1/tasks/working?force=true")
    deployment.wait("working")
    deployment.server.stop()
    deployment.data_dir = new
    deployment.start_server()
    assert (deployment.status("over")["state"], deployment.status("working")["state"]) == ("cancelled", "failed")
    assert deployment.status("working")["error"]["code"] == "host_lost"
    assert "metadata.json" in deployment.artifact_names("over")
    assert admin("check", "--deep") == {"clean": True, "tasks": 2, "findings": []}
