"""An operator checks, backs up, prunes and restores a server while a task works."""

import json
import os
import subprocess
import sys

import pytest

from doubles.live import bash, says


@pytest.fixture
def admin(empty_world):
    """Run `sandbox admin …` against the server and its data directory."""

    def run(command, *arguments, data_dir=None, code=0):
        asks_the_server = command == "prune" and "--offline" not in arguments
        place = [] if asks_the_server else ["--data-dir", str(data_dir or empty_world.data_dir)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(empty_world.home), "SANDBOX_SERVER": empty_world.server.said["http"]
        }  # fmt: skip
        words = [sys.executable, "-m", "sandbox", "admin", command, *arguments, *place, "--format", "json"]
        done = subprocess.run(words, capture_output=True, timeout=100, check=False, env=environment)
        assert done.returncode == code, done.stderr.decode()
        return json.loads(done.stdout) if done.stdout else done.stderr.decode()

    return run


def test_all_of_it_beside_a_task_that_runs(world, admin, tmp_path):
    here = world(bash("until [ -e /workspace/go ]; do echo waiting; sleep 0.3; done"), says())
    here.submit("over")
    here.until_state("running", "over", seconds=60)
    here.http.delete("/api/v1/tasks/over?force=true")
    here.wait("over")
    here.submit("working")
    here.until_state("running", "working", seconds=60)

    assert admin("check", "--deep") == {"clean": True, "tasks": 2, "findings": []}
    file = tmp_path / "backup.tar"
    assert admin("backup", str(file))["remarks"] == []
    assert "stop it" in admin("rebuild", code=4)
    assert "stop it" in admin("prune", "--offline", "--keep", "1", code=4)

    would = admin("prune", "--older-than", "1s", "--dry-run")
    gone = admin("prune", "--older-than", "1s")
    assert [task["id"] for task in gone["tasks"]] == [task["id"] for task in would["tasks"]] == ["over"]
    for path in ("", "/logs", "/artifacts", "/artifacts/metadata.json"):
        answer = here.http.get(f"/api/v1/tasks/over{path}")
        assert (answer.status_code, answer.json()["error"]) == (404, "task_not_found")
    assert [task["id"] for task in here.http.get("/api/v1/tasks").json()["tasks"]] == ["working"]
    assert here.status("working")["state"] == "running"
    assert admin("check", "--deep")["clean"]

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
