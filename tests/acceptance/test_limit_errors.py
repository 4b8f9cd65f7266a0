"""If a sandbox reaches a resource limit, the agent gets an error and the limit is reported to the user."""

import asyncio
import contextlib
import json
import threading
import time

import pytest
from websockets.sync.client import connect

from doubles.deployment import bash_turn, python_turn, reply_turn
from doubles.runtime_availability import require_runtime
from sandbox.disks.loop_disk import loop_unavailable_reason

FILL_DISK_COMMAND = "dd if=/dev/zero of=$HOME/filler bs=1M count=400 2>&1; echo made > small.txt"
WRITE_LOG_COMMAND = "dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\\0' 'x' | fold -w 1023 > flood.log"
CREATE_FILES_PROGRAM = """
import os
for directory in range(10):
    os.makedirs(f"many/{directory}")
    for number in range(1000):
        open(f"many/{directory}/{number}", "w").close()
"""
FILL_MEMORY_PROGRAM = "x = [bytearray(64 * 1024 * 1024) for _ in range(64)]"
FORK_PROGRAM = """
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


RESPONSE_SECONDS = 1.0
"""The default `timeoutSeconds` of a Kubernetes probe.

With four busy processes on two cores, the slowest response took 0.4 s.
"""


def pause_command(seconds):
    """Return a command that waits without a plain `sleep`, which Claude Code does not run."""
    return f"python3 -c 'import time; time.sleep({seconds})'"


@pytest.fixture
def has_disk_limit(tmp_path):
    """Return whether disk limits are enforced on this machine."""
    return asyncio.run(loop_unavailable_reason(tmp_path)) is None


FILL_DISK_TURNS = (
    bash_turn(f"{FILL_DISK_COMMAND}; {pause_command(4)}"),
    bash_turn("rm $HOME/filler; echo again > again.txt; cat small.txt again.txt"),
)


def errors(deployment):
    return {event["error"]: event["message"] for event in deployment.wire_events() if event["type"] == "error"}


def check_full_disk_is_reported(deployment, first, second, size):
    """Check that the agent got ENOSPC and continued, and that the full disk is reported."""
    assert "No space left on device" in first
    assert second.endswith("again")
    assert f"vm.disk is {size}" in errors(deployment)["disk_full"]
    assert b"+again" in deployment.artifact("task-1.patch")


def check_reported_after_the_first_call(events):
    """Check that the disk is reported as full only after the first tool call, whose file fits on the disk."""
    kinds = [event["error"] if event["type"] == "error" else event["type"] for event in events]
    assert kinds.index("tool_call") < kinds.index("disk_full")


def check_completed_or_out_of_memory(deployment):
    """Check that the task completes if the OOM killer kills the tool, and fails if it kills the agent."""
    status = deployment.wait(seconds=110)
    assert status["state"] == "completed" or status["error"]["code"] == "out_of_memory", deployment.diagnostics()


def test_agent_killed_on_a_full_disk_fails_with_disk_full(deploy_and_check_leftovers):
    deployment = deploy_and_check_leftovers(bash_turn(FILL_DISK_COMMAND), bash_turn("kill -9 $PPID"))
    deployment.submit(vm={"disk": "100M"})
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "disk_full"), deployment.diagnostics()
    assert "vm.disk" in status["error"]["message"]


@pytest.fixture
def measured_responses():
    """Polls the server during a `with` block; yields the list of response times in seconds."""

    @contextlib.contextmanager
    def measure(deployment):
        durations, is_done = [], threading.Event()

        def poll():
            while not is_done.wait(0.25):
                started_at = time.monotonic()
                assert deployment.http.get("/api/v1/tasks/task-1").status_code == 200
                durations.append(time.monotonic() - started_at)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield durations
        finally:
            is_done.set()
            thread.join(30)

    return measure


def test_server_responds_and_reports_metrics_under_resource_exhaustion(
    has_disk_limit, deploy_and_check_leftovers, measured_responses
):
    """Memory is exhausted last, since the OOM killer may kill the agent."""
    fits = bash_turn(f"dd if=/dev/zero of=filler bs=1M count=60 2>&1; {pause_command(6)}; rm filler")
    outputs = bash_turn("dd if=/dev/zero bs=1M count=8 2>/dev/null | tr '\\0' 'x'")
    exhausting_turns = (
        outputs,
        bash_turn(WRITE_LOG_COMMAND),
        python_turn(CREATE_FILES_PROGRAM),
        python_turn(FORK_PROGRAM),
        python_turn(FILL_MEMORY_PROGRAM),
    )
    fills = FILL_DISK_TURNS if has_disk_limit else ()
    deployment = deploy_and_check_leftovers(fits, *fills, *exhausting_turns, reply_turn())
    deployment.submit(vm={"memory": "1G", "disk": "200M"})
    with measured_responses(deployment) as durations, stream_of(deployment) as stream:
        events = [json.loads(text) for text in stream]
        check_completed_or_out_of_memory(deployment)
    assert max(durations) < RESPONSE_SECONDS
    metrics = [event["metrics"] for event in events if event["type"] == "metrics"]
    assert any(60_000_000 < (each["disk_used_bytes"] or 0) < 120_000_000 for each in metrics)
    assert all((each["disk_total_bytes"] or 0) <= 200 * 1024 * 1024 for each in metrics)
    tool_results = deployment.tool_results()
    if has_disk_limit:
        check_full_disk_is_reported(deployment, tool_results[1], tool_results[2], "200M")
        check_reported_after_the_first_call(events)
    assert "Resource temporarily unavailable" in tool_results[len(fills) + 4]
    assert "512" in errors(deployment)["process_limit"]
    assert errors(deployment).keys() - ({"disk_full"} if has_disk_limit else ()) == {"process_limit", "out_of_memory"}
    patch = deployment.artifact("task-1.patch")
    assert (patch.count(b"diff --git a/many/"), b"+++ b/flood.log" in patch) == (10_000, True)
    assert json.loads(deployment.artifact("metadata.json"))["state"] == deployment.status()["state"]


def test_limit_errors_are_reported_in_gvisor(has_disk_limit, deploy_and_check_leftovers, deployment, tmp_path):
    require_runtime("gvisor", tmp_path / "probe")
    deployment.runtime = "gvisor"
    fills = FILL_DISK_TURNS if has_disk_limit else ()
    deployment = deploy_and_check_leftovers(*fills, python_turn(FILL_MEMORY_PROGRAM), reply_turn())
    deployment.submit(vm={"disk": "100M", "memory": "1G"})
    check_completed_or_out_of_memory(deployment)
    if has_disk_limit:
        check_full_disk_is_reported(deployment, *deployment.tool_results()[:2], "100M")
    assert "out_of_memory" in errors(deployment)


def stream_of(deployment):
    return connect(f"{deployment.server.ready_message['ws']}/api/v1/tasks/stream?task_id=task-1", max_size=None)
