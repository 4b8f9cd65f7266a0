"""What a sandbox runs out of is a bound of its own, which the agent feels and its user reads."""

import asyncio
import contextlib
import json
import threading
import time

import pytest
from websockets.sync.client import connect

from doubles.live import bash, python, says
from doubles.tiers import need_runtime
from sandbox.disks.probe import why_no_loop

FILL = "dd if=/dev/zero of=$HOME/filler bs=1M count=400 2>&1; echo made > small.txt"
FLOOD = """
import glob, os
line = b"x" * 1023 + b"\\n"
with open("flood.log", "wb") as file:
    for _ in range(40_000):
        file.write(line)
"""
FILES = """
import os
for directory in range(40):
    os.makedirs(f"many/{directory}")
    for number in range(1000):
        open(f"many/{directory}/{number}", "w").close()
"""
HOG = "x = [bytearray(64 * 1024 * 1024) for _ in range(64)]"
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


@pytest.fixture(params=["bubblewrap", "gvisor"], autouse=True)
def runtime(request, tmp_path, empty_world):
    """What makes the sandboxes."""
    need_runtime(request.param, tmp_path)
    empty_world.runtime = request.param
    return request.param


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


def test_a_fork_bomb_ends_at_the_bound_and_is_told(watched, runtime):
    machine = watched(python(FORK), bash("echo lives > lives.txt"), says())
    machine.submit()
    status = machine.wait()
    if runtime == "gvisor" and status["state"] == "failed":
        # At the bound it may be Claude Code itself that asks for a thread, and it gives up without one.
        assert (status["error"]["code"], "SIGABRT" in status["error"]["message"]) == ("agent_failed", True)
        return
    assert status["state"] == "completed", machine.tell()
    assert "Resource temporarily unavailable" in machine.tool_results()[0]
    if runtime != "gvisor":  # whose kernel counts alone; `sandbox doctor` says so
        assert "512" in told(machine)["process_limit"]
    assert json.loads(machine.artifact("metadata.json"))["state"] == "completed"


@pytest.fixture
def answers_meanwhile():
    """Whether the server answers, again and again, while a task does its worst; gives the longest wait in seconds."""

    @contextlib.contextmanager
    def watch(machine):
        waits, over = [], threading.Event()

        def ask():
            while not over.wait(0.1):
                began = time.monotonic()
                assert machine.http.get("/api/v1/tasks/task-1").status_code == 200
                waits.append(time.monotonic() - began)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield waits
        finally:
            over.set()
            asking.join(30)

    return watch


@pytest.mark.parametrize(
    ("attack", "vm", "code"),
    [
        pytest.param(bash("cat /dev/zero | tr '\\0' 'x' | head -c 41943040"), {}, None, id="40 MB of output"),
        pytest.param(python(FLOOD), {}, None, id="a file of 40 MB"),
        pytest.param(python(FILES), {}, None, id="40,000 files"),
        pytest.param(python(HOG), {"memory": "1G"}, "out_of_memory", id="a memory hog"),
    ],
)
def test_the_server_answers_while_an_agent_does_its_worst(watched, answers_meanwhile, attack, vm, code):
    machine = watched(attack, bash("echo lives > lives.txt"), says())
    machine.submit(vm=vm)
    with answers_meanwhile(machine) as waits:
        status = machine.wait(seconds=110)
    # An agent whose own process is the victim does not survive; one whose tool is goes on.
    assert status["state"] == "completed" or status["error"]["code"] == code, machine.tell()
    assert max(waits) < 1.0
    assert code is None or code in told(machine)
