"""What earlier versions left is listed, told, finished and delivered by this one.

Each file of `recorded/` is the data directory of a server of that commit, copied while it worked: `whole` is finished,
`cut-off` was running. Its runner is long gone, so that it ends as lost.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

RECORDED = sorted((Path(__file__).parent / "recorded").glob("data-of-*.tar.gz"))


@pytest.fixture(params=RECORDED, ids=lambda path: path.name.split(".")[0])
def old(request, empty_world):
    """A server of today on the data of back then."""
    with tarfile.open(request.param) as archive:
        archive.extractall(empty_world.data_dir, filter="data")
    empty_world.data_dir.chmod(0o700)
    empty_world.start_git()
    empty_world.start_model()
    return empty_world


def check(world):
    command = [sys.executable, "-m", "sandbox", "admin", "check", "--deep", "--format", "json"]
    done = subprocess.run(
        [*command, "--data-dir", str(world.data_dir)], capture_output=True, timeout=60, check=False, env={"HOME": "/"}
    )
    return json.loads(done.stdout), done.stderr


def recorded(world, task_id):
    lines = (world.data_dir / "tasks" / task_id / "journal" / "records").read_bytes().splitlines()
    return [json.loads(line[9:]) for line in lines]


def test_there_is_a_recording_of_the_first_version_and_of_a_late_one():
    assert len(RECORDED) >= 2


@pytest.mark.usefixtures("true_starts")
def test_todays_server_goes_on_where_an_older_one_stopped(old):
    before = recorded(old, "whole")
    old.start_server(SANDBOX_RETENTION_OLDER_THAN="unlimited")
    listed = old.http.get("/api/v1/tasks?sort=created_at&order=asc").json()
    assert [task["id"] for task in listed["tasks"]] == ["whole", "cut-off"]

    ended = old.wait("cut-off")
    assert ended["state"] == "failed"
    assert ended["error"]["code"] in {"runner_lost", "host_lost", "sandbox_lost"}
    assert ended["started_at"] is not None

    whole = old.status("whole")
    assert (whole["state"], whole["exit_code"], whole["name"]) == ("completed", 0, "Fix the example")
    assert whole["created_at"] == before[0]["at"][:23] + "Z"
    assert whole["progress"]["tool_calls"] == 5
    assert whole["definition"]["vm"]["profile"] == "agentic-dev"
    assert old.states("whole") == [
        "pending", "staging", "provisioning", "ready", "running", "completing", "completed",
    ]  # fmt: skip
    assert [frame["seq"] for frame in old.frames("whole")][-1] == len(before) + 1
    told = old.logs("whole", "stdout").splitlines()
    assert len(told) == sum(one["event"]["type"] == "output" and one["event"]["stream"] == "stdout" for one in before)
    for one in old.http.get("/api/v1/tasks/whole/artifacts").json()["artifacts"]:
        content = old.artifact(one["name"], "whole")
        assert one["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert b"return sum(prices)" in old.artifact("whole.patch", "whole")

    found, said = check(old)
    assert found == {"clean": True, "tasks": 2, "findings": []}, said
