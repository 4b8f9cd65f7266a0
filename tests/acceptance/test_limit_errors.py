"""What a sandbox runs out of is a bound of its own, which the agent feels and its user reads."""

import asyncio
import contextlib
import json
import threading
import time

import pytest
from websockets.sync.client import connect

from doubles.live_server import bash, python, says
from doubles.runtimes import need_runtime
from sandbox.disks.loop import loop_unavailable_reason

FILL = "dd if=/dev/zero of=$HOME/filler bs=1M count=400 2>&1; echo made > small.txt"
FLOOD = "dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\\0' 'x' | fold -w 1023 > flood.log"
FILES = """
import os
for directory in range(10):
    os.makedirs(f"many/{directory}")
    for number in range(1000):
        open(f"many/{directory}/{number}", "w").close()
"""
HOG = "x = [bytearray(64 * 1024 * 1024) for _ in range(64)]"
FORK = """
import os, signal
started = []
try:
    for _ in range(600):
        started.append(os.fork())
        if not started[-1]:
            signal.pause()
except OSError as error:
    print(error)
for each in started:
    os.kill(each, signal.SIGKILL)
"""


ANSWER_SECONDS = 1.0
"""What health checks give a server by default. The longest seen beside four busy processes on two cores was 0.4."""


def pause(seconds):
    """A tool call's way to wait; Claude Code keeps a plain sleep from its agents."""
    return f"python3 -c 'import time; time.sleep({seconds})'"


@pytest.fixture
def disks_tell(tmp_path):
    """Whether full disks tell the agent on this machine."""
    return asyncio.run(loop_unavailable_reason(tmp_path)) is None


FILLS = (bash(f"{FILL}; {pause(4)}"), bash("rm $HOME/filler; echo again > again.txt; cat small.txt again.txt"))


def told(machine):
    return {frame["error"]: frame["message"] for frame in machine.frames() if frame["type"] == "error"}


def tells_of_a_full_disk(machine, first, second, size):
    """The agent felt it, went on without what did not fit, and its user reads it."""
    assert "No space left on device" in first
    assert second.endswith("again")
    assert f"vm.disk is {size}" in told(machine)["disk_full"]
    assert b"+again" in machine.artifact("task-1.patch")


def is_told_once_it_is_full(frames):
    """And not while what the first tool call wrote fitted, which that call's frame, told at its end, follows."""
    kinds = [frame["error"] if frame["type"] == "error" else frame["type"] for frame in frames]
    assert kinds.index("tool_call") < kinds.index("disk_full")


def survives_or_is_the_victim(machine):
    """Of a lack of memory: an agent whose tool is the victim goes on."""
    status = machine.wait(seconds=110)
    assert status["state"] == "completed" or status["error"]["code"] == "out_of_memory", machine.tell()


def test_an_agent_that_dies_on_a_full_disk_fails_for_it(watched):
    machine = watched(bash(FILL), bash("kill -9 $PPID"))
    machine.submit(vm={"disk": "100M"})
    status = machine.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "disk_full"), machine.tell()
    assert "vm.disk" in status["error"]["message"]


@pytest.fixture
def answers_meanwhile():
    """Asks the server again and again while a task does its worst; gives how long each answer took in seconds."""

    @contextlib.contextmanager
    def watch(machine):
        waits, over = [], threading.Event()

        def ask():
            while not over.wait(0.25):
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


def test_the_server_answers_and_tells_the_figures_while_an_agent_does_its_worst(disks_tell, watched, answers_meanwhile):
    """The last that it runs out of is memory: an agent that is the victim itself goes on no more."""
    fits = bash(f"dd if=/dev/zero of=filler bs=1M count=60 2>&1; {pause(6)}; rm filler")
    outputs = bash("dd if=/dev/zero bs=1M count=8 2>/dev/null | tr '\\0' 'x'")
    hogs = (outputs, bash(FLOOD), python(FILES), python(FORK), python(HOG))
    fills = FILLS if disks_tell else ()
    machine = watched(fits, *fills, *hogs, says())
    machine.submit(vm={"memory": "1G", "disk": "200M"})
    with answers_meanwhile(machine) as waits, stream_of(machine) as stream:
        frames = [json.loads(text) for text in stream]
        survives_or_is_the_victim(machine)
    assert max(waits) < ANSWER_SECONDS
    figures = [frame["metrics"] for frame in frames if frame["type"] == "metrics"]
    assert any(60_000_000 < (each["disk_used_bytes"] or 0) < 120_000_000 for each in figures)
    assert all((each["disk_total_bytes"] or 0) <= 200 * 1024 * 1024 for each in figures)
    answers = machine.tool_results()
    if disks_tell:
        tells_of_a_full_disk(machine, answers[1], answers[2], "200M")
        is_told_once_it_is_full(frames)
    assert "Resource temporarily unavailable" in answers[len(fills) + 4]
    assert "512" in told(machine)["process_limit"]
    assert told(machine).keys() - ({"disk_full"} if disks_tell else ()) == {"process_limit", "out_of_memory"}
    made = machine.artifact("task-1.patch")
    assert (made.count(b"diff --git a/many/"), b"+++ b/flood.log" in made) == (10_000, True)
    assert json.loads(machine.artifact("metadata.json"))["state"] == machine.status()["state"]


def test_an_agent_with_a_kernel_of_its_own_is_told_the_same(disks_tell, watched, empty_world, tmp_path):
    need_runtime("gvisor", tmp_path / "probe")
    empty_world.runtime = "gvisor"
    fills = FILLS if disks_tell else ()
    machine = watched(*fills, python(HOG), says())
    machine.submit(vm={"disk": "100M", "memory": "1G"})
    survives_or_is_the_victim(machine)
    if disks_tell:
        tells_of_a_full_disk(machine, *machine.tool_results()[:2], "100M")
    assert "out_of_memory" in told(machine)


def stream_of(machine):
    return connect(f"{machine.server.said['ws']}/api/v1/tasks/stream?task_id=task-1", max_size=None)
