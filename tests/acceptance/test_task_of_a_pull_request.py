"""The CI script for pull requests, run with the real server, writes the comment, the patch and the cost."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.deployment import bash_turn, git, reply_turn

SCRIPT = Path(__file__).parents[2] / "packaging" / "github" / "run-task"


@pytest.fixture
def run_task(tmp_path):
    """Runs the script as a CI job does for a pull request of the deployment's repository."""

    def run(deployment, **variables):
        environment = {
            "PATH": os.environ["PATH"],
            "SANDBOX_SERVER": deployment.server.ready_message["http"],
            "PYTHONWARNINGS": "error",
            "REPOSITORY_URL": "https://github.com/org/repo.git",
            "BRANCH": "main",
            "COMMIT": deployment.commit,
            "PROMPT": "Mend it.",
            "OUTPUT": str(tmp_path / "result"),
            **variables,
        }
        command = [sys.executable, str(SCRIPT)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    return run


def test_patch_and_cost_are_written_for_the_pull_request(deploy, run_task, tmp_path):
    hostile = "````\n@everyone <script>alert(1)</script>\n"
    deployment = deploy(
        bash_turn(f"printf '{hostile}' > new.md && echo mended > a.txt"), reply_turn("Done.\n```\n@everyone")
    )
    fields = json.dumps({"lifecycle": {"budget_usd": 2}, "metadata": {"labels": {"pr": "7"}}})
    result = run_task(deployment, NAME="A title", FIELDS=fields)
    assert result.returncode == 0, result.stderr
    comment = (tmp_path / "result" / "comment.md").read_text()
    assert comment.startswith("**Sandbox: task `")
    assert "2 turns · 1 tool calls · 2,000 tokens in, 100 out · $0.00" in comment
    assert "\n`````diff\ndiff --git a/a.txt b/a.txt" in comment  # one more backtick than in the patch's own fence
    assert "\n````\nDone.\n```\n@everyone\n````\n" in comment
    task = json.loads((tmp_path / "result" / "task.json").read_text())
    assert (task["name"], task["labels"]) == ("A title", {"pr": "7"})
    git("clone", "-q", str(deployment.repositories / "repo.git"), "checkout", cwd=tmp_path)
    git("apply", str(tmp_path / "result" / "task.patch"), cwd=tmp_path / "checkout")
    assert (tmp_path / "checkout" / "a.txt").read_text() == "mended\n"


def test_unsuccessful_task_fails_the_job_with_a_comment(deploy, run_task, tmp_path):
    deployment = deploy(bash_turn("sleep 300"), reply_turn())
    failed = run_task(deployment, COMMIT="0" * 40)
    assert failed.returncode == 1
    comment = (tmp_path / "result" / "comment.md").read_text()
    assert " failed**" in comment
    assert "clone_failed: " in comment
    assert " failed: clone_failed: " in failed.stderr

    refused = run_task(deployment, FIELDS='{"vm": {"cpus": "many"}, "extra": 1}')
    assert refused.returncode == 1
    assert "vm.cpus: " in refused.stderr
    assert "extra: " in refused.stderr

    too_long = run_task(deployment, TIMEOUT_MINUTES="0.001")
    assert too_long.returncode == 1
    assert " cancelled**" in (tmp_path / "result" / "comment.md").read_text()


VARIABLES = {"SANDBOX_SERVER": "http://127.0.0.1:9", "REPOSITORY_URL": "https://github.com/org/repo.git"}
VARIABLES |= {"BRANCH": "main", "COMMIT": "0" * 40, "PROMPT": "Mend it."}


def test_unreachable_server_is_reported_in_one_line(tmp_path):
    environment = {
        **VARIABLES,
        "PATH": os.environ["PATH"],
        "PYTHONWARNINGS": "error",
        "OUTPUT": str(tmp_path / "result"),
    }
    command = [sys.executable, str(SCRIPT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "127.0.0.1:9" in result.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PROMPT": "", "COMMIT": ""}, "Set PROMPT, COMMIT in the environment; "),
        ({"FIELDS": "{"}, "FIELDS is not JSON: "),
        ({"TIMEOUT_MINUTES": "an hour"}, "TIMEOUT_MINUTES is not a number"),
        ({"OUTPUT": "/dev/null/result"}, "/dev/null/result: Not a directory"),
        ({"SANDBOX_SERVER": "nowhere"}, "nowhere"),
    ],
)
def test_invalid_variable_is_reported_in_one_line(monkeypatch, tmp_path, variables, message):
    for name, value in {**VARIABLES, "OUTPUT": str(tmp_path / "result"), **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in exited.value.code  # Python prints a message to stderr and exits with 1
    assert "\n" not in exited.value.code
