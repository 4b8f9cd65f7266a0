"""A task that floods its gateway and its output costs the runner a bounded part of a processor, and stays in hand."""

import base64
import json
import time
from pathlib import Path

from doubles import floods
from doubles.flood_bench import cpu_seconds
from doubles.live_server import bash, until
from doubles.runners import runner_pid
from sandbox.gateway.limits import NEW_MODEL_DEBT_SECONDS
from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES

PORTS = {"model": 8123, "proxy": 3128, "names": 53, "names_tcp": 53, "transparent_80": 80, "transparent_443": 443}
NAMES = ("names that are refused over UDP", "refused tunnels", "requests with a wrong key")
FLOOD_SECONDS = 12.0
OWN_CPU_SECONDS = 1.0
"""Of a runner beside what a sandbox makes it do: the journal, progress, samples."""


def flooding(*names):
    source = base64.b64encode(Path(floods.__file__).read_bytes()).decode()
    ports = json.dumps({**PORTS, "host": 443})
    begin = [f"setsid python3 -I -S /tmp/floods.py '{name}' '{ports}' >/dev/null 2>&1 &" for name in names]
    return bash("\n".join([f"echo {source} | base64 -d > /tmp/floods.py", *begin, "sleep 1"]))


def test_a_flood_from_inside_is_bounded_while_the_agent_goes_on_and_cancelling_works(world):
    machine = world(flooding(*NAMES), bash("python3 -c 'import time; time.sleep(600)'"))
    machine.submit(vm={"cpus": 1})
    # The second tool call needs a model request in the middle of the flood.
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, 90, "the second tool call")
    runner = runner_pid(machine)
    began, before = time.monotonic(), cpu_seconds(runner)
    time.sleep(FLOOD_SECONDS)
    used, lasted = cpu_seconds(runner) - before, time.monotonic() - began
    at_once = RUNNER_CPU_BURST_SECONDS + NEW_MODEL_DEBT_SECONDS + OWN_CPU_SECONDS
    assert used < RUNNER_CPU_CORES * lasted + at_once
    assert machine.status()["progress"]["egress_denied"] > 100
    assert machine.http.delete("/api/v1/tasks/task-1").status_code == 200
    assert machine.wait(seconds=60)["state"] == "cancelled"
    told = [frame for frame in machine.frames() if frame["type"] in ("egress_denied", "error")]
    assert len(told) < 25 * (lasted + 60)
