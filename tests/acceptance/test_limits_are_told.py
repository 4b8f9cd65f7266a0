"""What a sandbox runs out of is a bound of its own, which the agent feels and its user reads."""

import asyncio
import json

import pytest
from websockets.sync.client import connect

from doubles.live import bash, python, says
from sandbox.disks.probe import why_no_loop

FILL = "dd if=/dev/zero of=$HOME/filler bs=1M count=400 2>&1; echo made > small.txt"
FORK = """
import subprocess
started = []
try:
    for _ in range(600):
        started.append(subprocess.Popen(["sleep", "60"]))
except OSError as error:
    print(error)
for each in started:
    each.kill()
"""


def pause(seconds):
    """A tool call's way to wait; Claude Code keeps a plain sleep from its agents."""
    return f"python3 -c 'import time; time.sleep({seconds})'"


@pytest.fixture
def disks_tell(tmp_path):
    """Full disks tell the agent on this machine."""
    reason = asyncio.run(why_no_loop(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")


def told(machine):
    return {frame["error"]: frame["message"] for frame in machine.frames() if frame["type"] == "error"}


def test_a_full_disk_tells_the_agent_which_goes_on_without_what_did_not_fit(disks_tell, watched):
    machine = watched(
        bash(f"{FILL}; {pause(4)}"), bash("rm $HOME/filler; echo again > again.txt; cat small.txt again.txt"), says()
    )
    machine.submit(vm={"disk": "100M"})
    status = machine.wait()
    assert status["state"] == "completed", machine.tell()
    first, second = machine.tool_results()
    assert "No space left on device" in first
    assert second.endswith("again")
    assert "vm.disk is 100M" in told(machine)["disk_full"]
    assert b"+again" in machine.artifact("task-1.patch")


def test_an_agent_that_dies_on_a_full_disk_fails_for_it(watched):
    machine = watched(bash(FILL), bash("kill -9 $PPID"))
    machine.submit(vm={"disk": "100M"})
    status = machine.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "disk_full"), machine.tell()
    assert "vm.disk" in status["error"]["message"]


def test_a_disk_that_is_large_enough_is_told_in_the_figures(watched):
    machine = watched(bash("dd if=/dev/zero of=filler bs=1M count=60 2>&1; " + pause(6)), says())
    machine.submit(vm={"disk": "200M"})
    with connect(f"{machine.server.said['ws']}/api/v1/tasks/stream?task_id=task-1") as stream:
        frames = [json.loads(text) for text in stream]
    assert machine.wait()["state"] == "completed", machine.tell()
    figures = [frame["metrics"] for frame in frames if frame["type"] == "metrics"]
    assert max(each["disk_used_bytes"] or 0 for each in figures) > 60_000_000
    assert all((each["disk_total_bytes"] or 0) <= 200 * 1024 * 1024 for each in figures)
    assert not told(machine)


def test_a_fork_bomb_ends_at_the_bound_and_is_told(watched):
    machine = watched(python(FORK), bash("echo lives > lives.txt"), says())
    machine.submit()
    status = machine.wait()
    assert status["state"] == "completed", machine.tell()
    assert "Resource temporarily unavailable" in machine.tool_results()[0]
    assert "512" in told(machine)["process_limit"]
    assert json.loads(machine.artifact("metadata.json"))["state"] == "completed"
