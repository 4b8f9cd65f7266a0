"""Tasks are found by words, repository and time, through HTTP, the command line and the Python client."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from doubles.deployment import bash_turn, reply_turn
from sandbox.client import Client, InvalidParameterError


def ids(page):
    return sorted(task["id"] for task in page["tasks"])


def test_tasks_are_also_found_after_a_restart(deploy):
    deployment = deploy(bash_turn("echo one > one.txt; echo two >> README.md"), reply_turn())
    deployment.submit("first", claude={"prompt": "Fix the flaky login test"})
    deployment.wait("first")
    deployment.submit("second", claude={"prompt": "Write the changelog"}, repository={"branch": "none"})
    deployment.wait("second")
    for _ in range(2):
        with Client(deployment.server.ready_message["http"]) as client:
            assert ids(client.tasks(search="LOGIN flak")) == ["first"]
            assert ids(client.tasks(search="login changelog")) == []
            assert ids(client.tasks(search="the", states=["failed"])) == ["second"]
            [first] = client.tasks(search="first")["tasks"]
            [second] = client.tasks(search="second")["tasks"]
            assert first["diff"]["files"] == 2
            assert first["diff"]["additions"] >= 2
            assert (second["diff"], second["error"]["code"], second["branch"]) == (None, "clone_failed", "none")
            assert first["duration_seconds"] > 0
            assert ids(client.tasks(repository=first["repository"])) == ["first", "second"]
            assert ids(client.tasks(repository="nobody/nothing")) == []
            hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
            assert ids(client.tasks(created_after=hour_ago)) == ["first", "second"]
            assert ids(client.tasks(created_before=hour_ago)) == []
            with pytest.raises(InvalidParameterError):
                client.tasks(search="x" * 10_000)
            for hostile in (
                "first OR second",
                'login" OR "',
                "NEAR(login)",
                "terms : login",
                "login\x00",
                "') --",
                "*",
            ):
                page = client.tasks(search=hostile)
                assert set(ids(page)) <= {"first", "second"}
        deployment.restart_server(9)

    listed = run_list(deployment, "-q", "flaky", "--since", "1h", "--format", "json")
    assert ids(json.loads(listed)) == ["first"]
    assert "first" in (table := run_list(deployment, "--repo", first["repository"]))
    assert "DURATION" in table


def test_task_is_selected_by_an_id_prefix(deploy):
    deployment = deploy(reply_turn())
    first, second = "0badcafe-1111-4111-8111-111111111111", "0badcafe-2222-4222-8222-222222222222"
    deployment.submit(first, claude={"prompt": "Say 0badcafe"})
    deployment.submit(second)
    deployment.wait(first)
    status = run_task(deployment, "status", "0badcafe-1", "--format", "json")
    assert json.loads(status.stdout)["id"] == first
    ambiguous = run_task(deployment, "status", "0badcafe")
    assert (ambiguous.returncode, ambiguous.stdout) == (2, "")
    assert first in ambiguous.stderr
    assert second in ambiguous.stderr
    assert run_task(deployment, "status", "0badcafd").returncode == 3


def run_list(deployment, *arguments):
    listed = run_task(deployment, "list", *arguments)
    assert listed.returncode == 0, listed.stderr
    return listed.stdout


def run_task(deployment, *arguments):
    environment = {**os.environ, "SANDBOX_SERVER": deployment.server.ready_message["http"]}
    command = [sys.executable, "-m", "sandbox", "task", *arguments]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
