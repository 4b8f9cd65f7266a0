"""A process that KILL does not end costs seconds, and no task its success. Frozen ones of cgroup v1 are such."""

import os
import signal
import time
from pathlib import Path

import pytest

from doubles.leftovers import left_behind
from doubles.live_server import bash, says, until

FREEZER = Path("/sys/fs/cgroup/freezer")
WORKS = (
    bash("setsid sleep 98765 >/dev/null 2>&1 & echo hi > new.txt"),
    bash("while ! test -e go; do sleep 0.05; done; rm go"),
)
SECONDS = 40
"""10 for the sandbox's end, 20 for that of a finisher and of the sandbox in teardown; the rest for a busy machine."""


@pytest.fixture
def freeze():
    """Freezes a process until the test is over; calling `thaw` ends that."""
    if os.getuid() != 0 or not os.access(FREEZER / "cgroup.procs", os.W_OK):
        pytest.skip("needs root and the freezer of cgroup v1; what is frozen by cgroup v2 ends on KILL")
    place = FREEZER / f"sandbox-test-{os.getpid()}"
    place.mkdir()

    def freeze(pid):
        (place / "cgroup.procs").write_text(str(pid))
        (place / "freezer.state").write_text("FROZEN")

    def thaw():
        (place / "freezer.state").write_text("THAWED")
        until(lambda: not (place / "cgroup.procs").read_text(), 20, "what was frozen to end")

    freeze.thaw = thaw
    yield freeze
    thaw()
    place.rmdir()


def find_sleeper(world):
    """The agent's background process, by its attempt's control group."""
    attempts = {path.name for path in world.data_dir.glob("tasks/*/attempts/*")}
    for directory in Path("/proc").iterdir():
        try:
            is_ours = any(one in (directory / "cgroup").read_text() for one in attempts)
            if is_ours and (directory / "cmdline").read_bytes() == b"sleep\x0098765\0":
                return int(directory.name)
        except OSError:
            continue
    return None


def go_on(pid):
    Path(f"/proc/{pid}/root/workspace/go").touch()


def test_a_success_is_recorded_though_a_process_of_its_sandbox_does_not_end(world, freeze):
    machine = world(*WORKS, says())
    machine.submit()
    pid = until(lambda: find_sleeper(machine), 60, "the background process")
    freeze(pid)
    go_on(pid)
    began = time.monotonic()
    assert machine.wait(seconds=SECONDS + 20)["state"] == "completed"
    assert time.monotonic() - began < SECONDS
    assert b"new.txt" in machine.artifact("task-1.patch")
    assert "teardown_failed" in machine.logs(stream="events")
    freeze.thaw()
    machine.restart_server(signal.SIGTERM)  # the janitor's first round
    until(lambda: not left_behind(machine.data_dir), 20, "the rest to be cleared away")
    assert machine.status()["state"] == "completed"


def test_a_task_all_of_whose_processes_end_takes_no_longer_for_it(world):
    machine = world(*WORKS, says())
    machine.submit()
    pid = until(lambda: find_sleeper(machine), 60, "the background process")
    go_on(pid)
    began = time.monotonic()
    assert machine.wait()["state"] == "completed"
    assert time.monotonic() - began < 10
    assert "teardown_failed" not in machine.logs(stream="events")
