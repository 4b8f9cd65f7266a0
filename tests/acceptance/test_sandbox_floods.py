"""A task that floods its gateway uses a bounded share of the runner's CPU, and can be cancelled."""

import base64
import json
import time
from pathlib import Path

from doubles import floods
from doubles.deployment import bash_turn, wait_until
from doubles.flood_harness import cpu_seconds
from doubles.runner_processes import runner_pid
from sandbox.gateway.limits import NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX
from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES

PORTS = {"model": 8123, "proxy": 3128, "dns_udp": 53, "dns_tcp": 53, "transparent_80": 80, "transparent_443": 443}
NAMES = ("denied DNS names over UDP", "refused tunnels", "requests with a wrong key")
FLOOD_SECONDS = 12.0
BASE_CPU_SECONDS = 1.0
"""CPU time that a runner uses for the journal, progress and samples, without load from the sandbox."""


def start_floods_turn(*names):
    source = base64.b64encode(Path(floods.__file__).read_bytes()).decode()
    ports = json.dumps({**PORTS, "host": 443})
    begin = [f"setsid python3 -I -S /tmp/floods.py '{name}' '{ports}' >/dev/null 2>&1 &" for name in names]
    return bash_turn("\n".join([f"echo {source} | base64 -d > /tmp/floods.py", *begin, "sleep 1"]))


def test_flood_from_the_sandbox_is_bounded_and_task_can_be_cancelled(deploy):
    deployment = deploy(start_floods_turn(*NAMES), bash_turn("python3 -c 'import time; time.sleep(600)'"))
    deployment.submit(vm={"cpus": 1})
    # The second tool call needs a model request in the middle of the flood.
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 2, 90, "the second tool call")
    runner = runner_pid(deployment)
    started_at, before = time.monotonic(), cpu_seconds(runner)
    time.sleep(FLOOD_SECONDS)
    used, elapsed = cpu_seconds(runner) - before, time.monotonic() - started_at
    burst_seconds = RUNNER_CPU_BURST_SECONDS + NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX + BASE_CPU_SECONDS
    assert used < RUNNER_CPU_CORES * elapsed + burst_seconds
    assert deployment.status()["progress"]["egress_denied"] > 100
    assert deployment.http.delete("/api/v1/tasks/task-1").status_code == 200
    assert deployment.wait(seconds=60)["state"] == "cancelled"
    events = [event for event in deployment.wire_events() if event["type"] in ("egress_denied", "error")]
    assert len(events) < 25 * (elapsed + 60)
