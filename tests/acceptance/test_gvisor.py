"""The main job and its ends in the runtime that has a kernel of its own."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from doubles.live import SERVER_KEY, bash, says, until
from doubles.tiers import need_runtime
from doubles.traces import left_behind

WAIT_FOREVER = "python3 -c 'import time; time.sleep(600)'"


@pytest.fixture
def machine(empty_world, world, tmp_path):
    """Makes a machine with gVisor, which is as it was before, 5 seconds after its task has ended."""
    need_runtime("gvisor", tmp_path / "probe")
    empty_world.runtime = "gvisor"
    yield world
    until(lambda: not left_behind(empty_world.data_dir), 5, "the sandbox to be gone without a trace")


def runner_pid(here):
    """The runner's process, by the lock that it holds on its task's journal."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            words = (descriptor.parents[1] / "cmdline").read_bytes()
            if b"sandbox.wiring.runner" in words and str(here.data_dir) in str(descriptor.readlink()):
                return int(descriptor.parents[1].name)
    raise AssertionError("there is no runner")


def test_the_agent_works_in_a_kernel_of_its_own_and_its_changes_come_back(machine):
    here = machine(bash("uname -r > kernel.txt; echo told >&2; echo more >> README.md; exit 3"), says("All done."))
    here.submit()
    status = here.wait()
    assert status["state"] == "completed", here.tell()
    assert (status["vm"]["runtime"], status["vm"]["tier"], status["exit_code"]) == ("gvisor", "gvisor", 0)
    assert "kernel of its own" in status["vm"]["isolates"]
    patch = here.artifact("task-1.patch").decode()
    assert "+more" in patch
    assert f"+{os.uname().release}\n" not in patch
    assert status["progress"]["tool_calls"] == 1
    assert status["progress"]["input_tokens"] > 0
    assert "Exit code 3" in here.tool_results()[0]
    assert "told" in here.tool_results()[0]
    health = here.http.get("/api/v1/health").json()
    assert [(one["name"], one["works"]) for one in health["runtimes"]] == [("gvisor", True)]
    assert SERVER_KEY not in here.logs()


def test_a_cancelled_agent_is_asked_to_end_and_its_half_is_kept(machine):
    here = machine(bash("echo half > half.txt"), bash(WAIT_FOREVER))
    here.submit()
    until(lambda: here.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    assert here.http.delete("/api/v1/tasks/task-1").status_code == 200
    status = here.wait(seconds=20)
    assert status["state"] == "cancelled"
    # Not 137: it ended on TERM and was not killed.
    assert status["exit_code"] == 128 + signal.SIGTERM
    assert b"+half" in here.artifact("task-1.patch")


def test_a_timeout_ends_it(machine):
    here = machine(bash(f"echo half > half.txt; {WAIT_FOREVER}"))
    here.submit(lifecycle={"timeout": "4s"})
    status = here.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "timeout")
    assert b"+half" in here.artifact("task-1.patch")


def test_out_of_memory_is_told_as_such(machine):
    here = machine(bash('echo half > half.txt; python3 -c "x = bytearray(1500 * 1024 * 1024)"'), says())
    here.submit(vm={"memory": "1G"})
    status = here.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "out_of_memory"), here.tell()
    assert b"+half" in here.artifact("task-1.patch")


def test_what_the_agent_starts_cannot_forge_its_result(machine):
    forged = json.dumps({"type": "result", "subtype": "success", "is_error": False, "result": "All done!"})
    here = machine(
        bash(
            f"echo '{forged}' > /proc/$PPID/fd/1 || echo refused > refused.txt; "
            "for fd in /proc/$PPID/fd/*; do echo forged > $fd; done; kill -9 $PPID"
        ),
        says(),
    )
    here.submit()
    status = here.wait()
    assert (status["state"], status["error"]["code"], status["exit_code"]) == ("failed", "agent_failed", 137)
    assert b"+refused" in here.artifact("task-1.patch")
    told = [json.loads(line) for line in here.artifact("transcript.ndjson").splitlines()]
    assert "result" not in {event["type"] for event in told}


def test_the_death_of_its_runner_ends_everything_inside(machine):
    here = machine(bash("echo half > half.txt"), bash(WAIT_FOREVER))
    here.submit()
    until(lambda: here.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    os.kill(runner_pid(here), signal.SIGKILL)
    status = here.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost")
    assert b"+half" in here.artifact("task-1.patch")
