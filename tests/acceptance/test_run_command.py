"""`sandbox run` in a clone with the real server, up to the applied patch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from doubles.deployment import bash_turn, git, reply_turn
from sandbox.demo.scripted_model import example_script
from sandbox.demo.walkthrough import make_example_repository


def run_in(checkout, deployment, *arguments):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(deployment.home),
        "SANDBOX_SERVER": deployment.server.ready_message["http"],
        "PYTHONWARNINGS": "error",
    }
    run = [sys.executable, "-m", "sandbox", "run", *arguments]
    return subprocess.run(run, cwd=checkout, env=environment, capture_output=True, timeout=90, check=False)


def test_documented_session_matches_the_real_output(deploy, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    commands, captured = re.findall(r"^```\w*\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)[:2]
    command = commands[commands.index("sandbox run") :].replace("\\\n", "")
    deployment = deploy(*example_script().turns)
    make_example_repository(deployment.repositories)
    git("clone", "-q", str(deployment.repositories / "example.git"), "example", cwd=tmp_path)
    checkout = tmp_path / "example"
    git("remote", "set-url", "origin", "https://github.com/org/example.git", cwd=checkout)
    result = run_in(checkout, deployment, *shlex.split(command)[2:], "--apply")
    assert result.returncode == 0, result.stderr.decode() + deployment.diagnostics("fix-basket")
    assert re.findall(r"[▸✗] \w+  [\w .]+?(?=  [0-9])", captured) == re.findall(
        r"[▸✗] \w+  [\w .]+?(?=  [0-9])", result.stderr.decode()
    )
    assert captured.splitlines()[-2:] == result.stderr.decode().splitlines()[-2:]
    files = " +1 -4  basket.py\n+15 -0  test_small_baskets.py\n"
    assert files in result.stderr.decode()
    documented_patch = captured[captured.index("diff --git") : captured.index(f"\n{files}")]
    actual_patch = deployment.artifact("fix-basket.patch", "fix-basket").decode()
    shortened = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", actual_patch)
    assert [line.strip() for line in documented_patch.splitlines()] == [line.strip() for line in shortened.splitlines()]


def test_uncommitted_changes_are_sent_and_the_patch_is_applied_to_them(deploy, tmp_path):
    deployment = deploy(
        bash_turn("cat mine.txt app.py > both.txt && git log --format=%s -2; sed -i s/not/never/ app.py"),
        reply_turn("Joined them."),
    )
    checkout = tmp_path / "checkout"
    clone = ["git", "clone", "-q", "https://github.com/org/repo.git", str(checkout)]
    user_environment = {"PATH": os.environ["PATH"], "HOME": str(deployment.home)}
    subprocess.run(clone, env=user_environment, check=True, timeout=60)
    (checkout / "src" / "app.py").write_text("print('not committed')\n")
    (checkout / "src" / "mine.txt").write_text("not even tracked\n")
    options = ("--include-dirty", "--apply", "--set", "claude.max_turns=5")
    result = run_in(checkout / "src", deployment, "Join them.", *options)
    assert result.returncode == 0, result.stderr.decode() + deployment.diagnostics(result.stdout.decode().strip())
    output = result.stderr.decode()
    assert "Joined them." in output
    assert "+1 -1  src/app.py" in output
    assert (checkout / "src" / "app.py").read_text() == "print('never committed')\n"
    assert (checkout / "src" / "both.txt").read_text() == "not even tracked\nprint('not committed')\n"
    assert git("status", "--porcelain", "-uall", cwd=checkout).splitlines() == [
        " M src/app.py", "?? src/both.txt", "?? src/mine.txt",
    ]  # fmt: skip
    task_id = result.stdout.decode().strip()
    patch = deployment.artifact(f"{task_id}.patch", task_id)
    assert patch.count(b"diff --git") == 2
    assert deployment.tool_results()[0].split("\n") == ["Changes submitted with the task", "Begin"]
    definition = deployment.status(task_id)["definition"]
    assert (definition["repository"]["commit"], definition["repository"]["subpath"]) == (deployment.commit, "src")
    assert definition["repository"]["patch"].startswith("sha256:")
    assert definition["claude"]["max_turns"] == 5
