"""`sandbox run` in a fresh clone, against the real server: from nothing to an applied patch."""

import os
import subprocess
import sys

from doubles.live import bash, says


def test_a_prompt_becomes_a_change_in_the_checkout(world, tmp_path):
    machine = world(bash("sed -i s/hello/goodbye/ app.py && echo new > new.txt"), says("Said goodbye."))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(machine.home),
        "SANDBOX_SERVER": machine.server.said["http"],
        "PYTHONWARNINGS": "error",
    }
    checkout = tmp_path / "checkout"
    clone = ["git", "clone", "-q", "https://github.com/org/repo.git", str(checkout)]
    subprocess.run(clone, env=environment, check=True, timeout=60)
    run = [sys.executable, "-m", "sandbox", "run", "Say goodbye.", "--apply", "--set", "claude.max_turns=5"]
    ran = subprocess.run(run, cwd=checkout / "src", env=environment, capture_output=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stderr.decode() + machine.tell(ran.stdout.decode().strip())
    assert (checkout / "src" / "app.py").read_text() == "print('goodbye')\n"
    assert (checkout / "src" / "new.txt").read_text() == "new\n"
    told = ran.stderr.decode()
    assert "Said goodbye." in told
    assert "+1 -1  src/app.py" in told
    definition = machine.status(ran.stdout.decode().strip())["definition"]
    assert (definition["repository"]["commit"], definition["repository"]["subpath"]) == (machine.commit, "src")
