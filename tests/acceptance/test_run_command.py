"""`sandbox run` in a fresh clone, against the real server: from nothing to an applied patch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from doubles.live_server import bash, git, says
from sandbox.demo.git_server import make_example_repository
from sandbox.demo.model_script import example_script


def run_in(checkout, machine, *arguments):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(machine.home),
        "SANDBOX_SERVER": machine.server.said["http"],
        "PYTHONWARNINGS": "error",
    }
    run = [sys.executable, "-m", "sandbox", "run", *arguments]
    return subprocess.run(run, cwd=checkout, env=environment, capture_output=True, timeout=90, check=False)


def test_what_the_page_shows_is_what_happens(world, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    command, _, captured = page.split("```\n$ ")[1].split("\n```")[0].partition("\n")
    machine = world(*example_script().turns)
    make_example_repository(machine.repositories)
    git("clone", "-q", str(machine.repositories / "example.git"), "example", cwd=tmp_path)
    checkout = tmp_path / "example"
    git("remote", "set-url", "origin", "https://github.com/org/example.git", cwd=checkout)
    ran = run_in(checkout, machine, *shlex.split(command)[2:], "--apply")
    assert ran.returncode == 0, ran.stderr.decode() + machine.tell("mend-basket")
    assert re.findall(r"[▸✗] \w+  [\w .]+?(?=  [0-9])", captured) == re.findall(
        r"[▸✗] \w+  [\w .]+?(?=  [0-9])", ran.stderr.decode()
    )
    assert captured.splitlines()[-3:] == ran.stderr.decode().splitlines()[-3:]
    shown = captured[captured.index("diff --git") : captured.index("\nApply this")]
    made = machine.artifact("mend-basket.patch", "mend-basket").decode()
    short = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", made)
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in short.splitlines()]


def test_a_prompt_and_work_that_is_not_pushed_go_along_and_the_answer_comes_back_upon_it(world, tmp_path):
    machine = world(
        bash("cat mine.txt app.py > both.txt && git log --format=%s -2; sed -i s/not/never/ app.py"),
        says("Joined them."),
    )
    checkout = tmp_path / "checkout"
    clone = ["git", "clone", "-q", "https://github.com/org/repo.git", str(checkout)]
    as_user = {"PATH": os.environ["PATH"], "HOME": str(machine.home)}
    subprocess.run(clone, env=as_user, check=True, timeout=60)
    (checkout / "src" / "app.py").write_text("print('not committed')\n")
    (checkout / "src" / "mine.txt").write_text("not even tracked\n")
    options = ("--include-dirty", "--apply", "--set", "claude.max_turns=5")
    ran = run_in(checkout / "src", machine, "Join them.", *options)
    assert ran.returncode == 0, ran.stderr.decode() + machine.tell(ran.stdout.decode().strip())
    told = ran.stderr.decode()
    assert "Joined them." in told
    assert "+1 -1  src/app.py" in told
    assert (checkout / "src" / "app.py").read_text() == "print('never committed')\n"
    assert (checkout / "src" / "both.txt").read_text() == "not even tracked\nprint('not committed')\n"
    assert git("status", "--porcelain", "-uall", cwd=checkout).splitlines() == [
        " M src/app.py", "?? src/both.txt", "?? src/mine.txt",
    ]  # fmt: skip
    task_id = ran.stdout.decode().strip()
    patch = machine.artifact(f"{task_id}.patch", task_id)
    assert patch.count(b"diff --git") == 2
    assert machine.tool_results()[0].split("\n") == ["Work that came with the task", "Begin"]
    definition = machine.status(task_id)["definition"]
    assert (definition["repository"]["commit"], definition["repository"]["subpath"]) == (machine.commit, "src")
    assert definition["repository"]["patch"].startswith("sha256:")
    assert definition["claude"]["max_turns"] == 5
