"""`sandbox run` in a fresh clone, against the real server: from nothing to an applied patch."""

import os
import subprocess
import sys

from doubles.live import bash, git, says


def run_in(checkout, machine, *arguments):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(machine.home),
        "SANDBOX_SERVER": machine.server.said["http"],
        "PYTHONWARNINGS": "error",
    }
    run = [sys.executable, "-m", "sandbox", "run", *arguments]
    return subprocess.run(run, cwd=checkout, env=environment, capture_output=True, timeout=90, check=False)


def test_work_that_is_not_pushed_goes_along_and_the_answer_comes_back_upon_it(world, tmp_path):
    machine = world(bash("cat mine.txt app.py > both.txt && git log --format=%s -2"), says())
    git("clone", "-q", str(machine.repositories / "repo.git"), "checkout", cwd=tmp_path)
    checkout = tmp_path / "checkout"
    git("remote", "set-url", "origin", "https://github.com/org/repo.git", cwd=checkout)
    (checkout / "src" / "app.py").write_text("print('not committed')\n")
    (checkout / "src" / "mine.txt").write_text("not even tracked\n")
    ran = run_in(checkout / "src", machine, "Join them.", "--include-dirty", "--apply")
    assert ran.returncode == 0, ran.stderr.decode() + machine.tell(ran.stdout.decode().strip())
    assert (checkout / "src" / "both.txt").read_text() == "not even tracked\nprint('not committed')\n"
    assert git("status", "--porcelain", "-uall", cwd=checkout).splitlines() == [
        " M src/app.py", "?? src/both.txt", "?? src/mine.txt",
    ]  # fmt: skip
    task_id = ran.stdout.decode().strip()
    patch = machine.artifact(f"{task_id}.patch", task_id)
    assert patch.count(b"diff --git") == 1
    assert machine.tool_results()[0].split("\n") == ["Work that came with the task", "Begin"]
    assert machine.status(task_id)["definition"]["repository"]["patch"].startswith("sha256:")


def test_a_prompt_becomes_a_change_in_the_checkout(world, tmp_path):
    machine = world(bash("sed -i s/hello/goodbye/ app.py && echo new > new.txt"), says("Said goodbye."))
    checkout = tmp_path / "checkout"
    clone = ["git", "clone", "-q", "https://github.com/org/repo.git", str(checkout)]
    as_user = {"PATH": os.environ["PATH"], "HOME": str(machine.home)}
    subprocess.run(clone, env=as_user, check=True, timeout=60)
    ran = run_in(checkout / "src", machine, "Say goodbye.", "--apply", "--set", "claude.max_turns=5")
    assert ran.returncode == 0, ran.stderr.decode() + machine.tell(ran.stdout.decode().strip())
    assert (checkout / "src" / "app.py").read_text() == "print('goodbye')\n"
    assert (checkout / "src" / "new.txt").read_text() == "new\n"
    told = ran.stderr.decode()
    assert "Said goodbye." in told
    assert "+1 -1  src/app.py" in told
    definition = machine.status(ran.stdout.decode().strip())["definition"]
    assert (definition["repository"]["commit"], definition["repository"]["subpath"]) == (machine.commit, "src")
