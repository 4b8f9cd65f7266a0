"""What CI runs for a pull request, against the real server: the comment, the patch, the cost."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.live_server import bash, git, says

SCRIPT = Path(__file__).parents[2] / "packaging" / "github" / "run-task"


@pytest.fixture
def run_task(tmp_path):
    """Run it for a pull request of the world's repository."""

    def run(machine, **variables):
        environment = {
            "PATH": os.environ["PATH"],
            "SANDBOX_SERVER": machine.server.said["http"],
            "PYTHONWARNINGS": "error",
            "REPOSITORY_URL": "https://github.com/org/repo.git",
            "BRANCH": "main",
            "COMMIT": machine.commit,
            "PROMPT": "Mend it.",
            "OUTPUT": str(tmp_path / "result"),
            **variables,
        }
        command = [sys.executable, str(SCRIPT)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    return run


def test_the_patch_and_its_cost_are_written_for_the_pull_request(world, run_task, tmp_path):
    hostile = "````\n@everyone <script>alert(1)</script>\n"
    machine = world(bash(f"printf '{hostile}' > new.md && echo mended > a.txt"), says("Done.\n```\n@everyone"))
    fields = json.dumps({"lifecycle": {"budget_usd": 2}, "metadata": {"labels": {"pr": "7"}}})
    ran = run_task(machine, NAME="A title", FIELDS=fields)
    assert ran.returncode == 0, ran.stderr
    comment = (tmp_path / "result" / "comment.md").read_text()
    assert comment.startswith("**Sandbox: task `")
    assert "2 turns · 1 tool calls · 2,000 tokens in, 100 out · $0.00" in comment
    assert "\n`````diff\ndiff --git a/a.txt b/a.txt" in comment  # one more than the longest in the patch
    assert "\n````\nDone.\n```\n@everyone\n````\n" in comment
    task = json.loads((tmp_path / "result" / "task.json").read_text())
    assert (task["name"], task["labels"]) == ("A title", {"pr": "7"})
    git("clone", "-q", str(machine.repositories / "repo.git"), "checkout", cwd=tmp_path)
    git("apply", str(tmp_path / "result" / "task.patch"), cwd=tmp_path / "checkout")
    assert (tmp_path / "checkout" / "a.txt").read_text() == "mended\n"


def test_what_did_not_come_to_its_end_is_told_and_fails_the_job(world, run_task, tmp_path):
    machine = world(bash("sleep 300"), says())
    failed = run_task(machine, COMMIT="0" * 40)
    assert failed.returncode == 1
    comment = (tmp_path / "result" / "comment.md").read_text()
    assert " failed**" in comment
    assert "clone_failed: " in comment
    assert " failed: clone_failed: " in failed.stderr

    refused = run_task(machine, FIELDS='{"vm": {"cpus": "many"}, "extra": 1}')
    assert refused.returncode == 1
    assert "vm.cpus: " in refused.stderr
    assert "extra: " in refused.stderr

    too_long = run_task(machine, TIMEOUT_MINUTES="0.001")
    assert too_long.returncode == 1
    assert " cancelled**" in (tmp_path / "result" / "comment.md").read_text()


ALONE = {"SANDBOX_SERVER": "http://127.0.0.1:9", "REPOSITORY_URL": "https://github.com/org/repo.git"}
ALONE |= {"BRANCH": "main", "COMMIT": "0" * 40, "PROMPT": "Mend it."}


def test_a_server_that_is_not_there_is_told_in_one_sentence(tmp_path):
    environment = {**ALONE, "PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "OUTPUT": str(tmp_path / "result")}
    command = [sys.executable, str(SCRIPT)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "127.0.0.1:9" in ran.stderr


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"PROMPT": "", "COMMIT": ""}, "Set PROMPT, COMMIT in the environment; "),
        ({"FIELDS": "{"}, "FIELDS is not JSON: "),
        ({"TIMEOUT_MINUTES": "an hour"}, "TIMEOUT_MINUTES is not a number"),
        ({"OUTPUT": "/dev/null/result"}, "/dev/null/result: Not a directory"),
        ({"SANDBOX_SERVER": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_with_a_variable_is_told_in_one_sentence(monkeypatch, tmp_path, variables, told):
    for name, value in {**ALONE, "OUTPUT": str(tmp_path / "result"), **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert told in ended.value.code  # what is no number is written to stderr, and the exit code is 1
    assert "\n" not in ended.value.code
