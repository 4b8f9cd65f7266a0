"""An operator checks, backs up, prunes and restores a server while a task works."""

import json
import os
import subprocess
import sys

import pytest

from doubles.forked_commands import run as forked
from doubles.live_server import make_repository
from doubles.stand_in_agent import make_stand_in


@pytest.fixture
def admin(empty_world):
    """Run `sandbox admin …` against the server and its data directory."""

    def run(command, *arguments, data_dir=None):
        place = [] if command == "prune" else ["--data-dir", str(data_dir or empty_world.data_dir)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(empty_world.home), "SANDBOX_SERVER": empty_world.server.said["http"]
        }  # fmt: skip
        words = [sys.executable, "-m", "sandbox", "admin", command, *arguments, *place, "--format", "json"]
        done = subprocess.run(words, capture_output=True, timeout=100, check=False, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


@pytest.fixture
def here(empty_world, tmp_path):
    """A server whose agents work for ten minutes."""
    make_repository(empty_world.repositories / "repo.git", {"README.md": "# Hi\n"})
    empty_world.start_git()
    empty_world.start_model()
    agent = make_stand_in(tmp_path / "agent", [('{"type": "assistant"}', 600.0)])
    empty_world.start_server(PYTHONPATH=str(agent))
    return empty_world


def test_all_of_it_beside_a_task_that_runs(here, admin, tmp_path):
    here.submit("over")
    here.until_state("running", "over", seconds=60)
    here.http.delete("/api/v1/tasks/over?force=true")
    here.wait("over")
    here.submit("working")
    here.until_state("running", "working", seconds=60)

    file = tmp_path / "backup.tar"
    assert admin("backup", str(file))["remarks"] == []
    refused = forked("admin", "rebuild", "--data-dir", here.data_dir, env={"HOME": str(here.home)})
    assert refused.returncode == 4
    assert b"stop it" in refused.stderr

    gone = admin("prune", "--older-than", "1s")
    assert [task["id"] for task in gone["tasks"]] == ["over"]
    for path in ("", "/logs", "/artifacts", "/artifacts/metadata.json"):
        answer = here.http.get(f"/api/v1/tasks/over{path}")
        assert (answer.status_code, answer.json()["error"]) == (404, "task_not_found")
    assert [task["id"] for task in here.http.get("/api/v1/tasks").json()["tasks"]] == ["working"]
    assert here.status("working")["state"] == "running"
    assert admin("check", "--deep") == {"clean": True, "tasks": 1, "findings": []}

    new = tmp_path / "new"
    assert admin("restore", str(file), data_dir=new)["lost"] == ["working"]
    here.http.delete("/api/v1/tasks/working?force=true")
    here.wait("working")
    here.server.stop()
    here.data_dir = new
    here.start_server()
    assert (here.status("over")["state"], here.status("working")["state"]) == ("cancelled", "failed")
    assert here.status("working")["error"]["code"] == "host_lost"
    assert "metadata.json" in here.artifact_names("over")
    assert admin("check", "--deep") == {"clean": True, "tasks": 2, "findings": []}
