"""A process that survives SIGKILL delays a task by only a few seconds.

The tests freeze processes with cgroup v1; a frozen process does not react to SIGKILL.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.leftovers import find_leftovers

FREEZER = Path("/sys/fs/cgroup/freezer")
WORK = (
    bash_turn("setsid sleep 98765 >/dev/null 2>&1 & echo hi > new.txt"),
    bash_turn("while ! test -e go; do sleep 0.05; done; rm go"),
)
END_SECONDS_MAX = 40
"""10 s for the end of the sandbox, 20 s for finalization and teardown, and a margin for a busy machine."""


@pytest.fixture
def freeze():
    """Freezes a process until `thaw` is called or the test ends."""
    if os.getuid() != 0 or not os.access(FREEZER / "cgroup.procs", os.W_OK):
        pytest.skip("needs root and the cgroup v1 freezer; processes frozen by cgroup v2 end on SIGKILL")
    cgroup = FREEZER / f"sandbox-test-{os.getpid()}"
    cgroup.mkdir()

    def freeze(pid):
        (cgroup / "cgroup.procs").write_text(str(pid))
        (cgroup / "freezer.state").write_text("FROZEN")

    def unfreeze():
        (cgroup / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (cgroup / "cgroup.procs").read_text(), 20, "the frozen process to end")

    freeze.thaw = unfreeze
    yield freeze
    unfreeze()
    cgroup.rmdir()


def find_sleeper(deployment):
    """Find the agent's background process by its attempt's control group."""
    attempts = {path.name for path in deployment.data_dir.glob("tasks/*/attempts/*")}
    for directory in Path("/proc").iterdir():
        try:
            is_of_deployment = any(one in (directory / "cgroup").read_text() for one in attempts)
            if is_of_deployment and (directory / "cmdline").read_bytes() == b"sleep\x0098765\0":
                return int(directory.name)
        except OSError:
            continue
    return None


def release_agent(pid):
    Path(f"/proc/{pid}/root/workspace/go").touch()


def test_task_completes_despite_an_unkillable_process(deploy, freeze):
    deployment = deploy(*WORK, reply_turn())
    deployment.submit()
    pid = wait_until(lambda: find_sleeper(deployment), 60, "the background process")
    freeze(pid)
    release_agent(pid)
    started_at = time.monotonic()
    assert deployment.wait(seconds=END_SECONDS_MAX + 20)["state"] == "completed"
    assert time.monotonic() - started_at < END_SECONDS_MAX
    assert b"new.txt" in deployment.artifact("task-1.patch")
    assert "teardown_failed" in deployment.logs(stream="events")
    freeze.thaw()
    deployment.restart_server(signal.SIGTERM)  # the janitor's first round removes the leftovers
    wait_until(lambda: not find_leftovers(deployment.data_dir), 20, "the leftovers to be removed")
    assert deployment.status()["state"] == "completed"


def test_task_with_killable_processes_ends_quickly(deploy):
    deployment = deploy(*WORK, reply_turn())
    deployment.submit()
    pid = wait_until(lambda: find_sleeper(deployment), 60, "the background process")
    release_agent(pid)
    started_at = time.monotonic()
    assert deployment.wait()["state"] == "completed"
    assert time.monotonic() - started_at < 10
    assert "teardown_failed" not in deployment.logs(stream="events")
