"""The current server can use the data directories of earlier versions.

Each file in `recorded/` contains the data directory of a server, copied while the server was running. The file is
named after the commit from which the server was built. The task `whole` is finished. The task `cut-off` was running,
and ends as lost because its runner no longer exists.
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
def upgraded(request, deployment):
    """A deployment with the recorded data directory."""
    with tarfile.open(request.param) as archive:
        archive.extractall(deployment.data_dir, filter="data")
    deployment.data_dir.chmod(0o700)
    deployment.start_git()
    deployment.start_model()
    return deployment


def admin_check(deployment):
    command = [sys.executable, "-m", "sandbox", "admin", "check", "--deep", "--format", "json"]
    done = subprocess.run(
        [*command, "--data-dir", str(deployment.data_dir)],
        capture_output=True,
        timeout=60,
        check=False,
        env={"HOME": "/"},
    )
    return json.loads(done.stdout), done.stderr


def journal_records(deployment, task_id):
    lines = (deployment.data_dir / "tasks" / task_id / "journal" / "records").read_bytes().splitlines()
    return [json.loads(line[9:]) for line in lines]


def check_conversation(deployment):
    """Check that the conversation, which the old runner did not record, is converted from its output."""
    events = [event for output in deployment.wire_events("whole") for event in output.get("conversation", ())]
    calls = [event for event in events if event["type"] == "tool_call_started"]
    results = [event["tool_use_id"] for event in events if event["type"] == "tool_result"]
    assert (len(calls), results) == (5, [call["tool_use_id"] for call in calls])
    assert all(call["summary"] for call in calls)
    assert [event["is_error"] for event in events if event["type"] == "agent_result"] == [False]
    text = deployment.http.get("/api/v1/tasks/whole/logs?stream=conversation").text
    assert sum(len(json.loads(line.partition("[EVENT] ")[2])["conversation"]) for line in text.splitlines()) == len(
        events
    )
    assert deployment.logs("whole", "all").count('"type":"conversation"') == len(text.splitlines())


def test_recordings_of_two_versions_exist():
    assert len(RECORDED) >= 2


@pytest.mark.usefixtures("without_command_fork_server")
def test_current_server_continues_with_data_of_an_older_version(upgraded):
    before = journal_records(upgraded, "whole")
    upgraded.start_server(SANDBOX_RETENTION_OLDER_THAN="unlimited")
    listed = upgraded.http.get("/api/v1/tasks?sort=created_at&order=asc").json()
    assert [task["id"] for task in listed["tasks"]] == ["whole", "cut-off"]

    ended = upgraded.wait("cut-off")
    assert ended["state"] == "failed"
    assert ended["error"]["code"] in {"runner_lost", "host_lost", "sandbox_lost"}
    assert ended["started_at"] is not None

    completed_status = upgraded.status("whole")
    assert (completed_status["state"], completed_status["exit_code"], completed_status["name"]) == (
        "completed",
        0,
        "Mend the example",
    )
    assert completed_status["created_at"] == before[0]["at"][:23] + "Z"
    assert completed_status["progress"]["tool_calls"] == 5
    assert completed_status["definition"]["vm"]["profile"] == "agentic-dev"
    assert upgraded.states("whole") == [
        "pending", "staging", "provisioning", "ready", "running", "completing", "completed",
    ]  # fmt: skip
    assert [event["seq"] for event in upgraded.wire_events("whole")][-1] == len(before) + 1
    stdout_lines = upgraded.logs("whole", "stdout").splitlines()
    assert len(stdout_lines) == sum(
        artifact["event"]["type"] == "output" and artifact["event"]["stream"] == "stdout" for artifact in before
    )
    check_conversation(upgraded)
    for artifact in upgraded.http.get("/api/v1/tasks/whole/artifacts").json()["artifacts"]:
        content = upgraded.artifact(artifact["name"], "whole")
        assert artifact["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert b"return sum(prices)" in upgraded.artifact("whole.patch", "whole")

    report, stderr = admin_check(upgraded)
    assert report == {"clean": True, "tasks": 2, "findings": []}, stderr
