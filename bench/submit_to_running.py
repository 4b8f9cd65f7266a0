"""Measures the time from a submission to `running`, and the memory of an idle runner.

Run with the project's Python: python bench/submit_to_running.py [ROUNDS]
The baseline is `claude --version` as a plain process, in the same run.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from sandbox.agents.claude_code.agent import find_binary
from sandbox.client import Client
from sandbox.demo.scripted_model import Fault, Script, Text, Turn
from sandbox.demo.walkthrough import make_example_repository, start_module, start_server

IDLE_TASKS = 4


def seconds_between(status, first, last):
    """Return the time from one state to another, according to the timestamps in the journal."""
    at = {entry["new_state"]: datetime.fromisoformat(entry["timestamp"]) for entry in status}
    return (at[last] - at[first]).total_seconds()


def run_task(client, url, number):
    """Submit a task and wait for it; return the state changes."""
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"id": f"bench-{number}", "name": "bench"},
        "repository": {"url": url, "branch": "main"},
        "claude": {"prompt": "Say hello."},
    }
    client.submit(json.dumps(manifest).encode(), "application/json")
    return [event for event in client.events(f"bench-{number}") if event["type"] == "state_change"]


def runner_memory(server_pid):
    """Return the resident, proportional and private memory of each runner in MB. A fork server is their parent."""
    runners = []
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and b"sandbox.bootstrap.runner" in (directory / "cmdline").read_bytes():
                parent = Path("/proc", (directory / "stat").read_text().rpartition(")")[2].split()[1])
                if (
                    parent.name == str(server_pid)
                    or b"sandbox.bootstrap.runner" not in (parent / "cmdline").read_bytes()
                ):
                    continue
                rollup = (directory / "smaps_rollup").read_text()
                fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
                kilobytes = {name: int(value.split()[0]) for name, value in fields.items()}
                private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
                runners.append((kilobytes["Rss"] / 1024, kilobytes["Pss"] / 1024, private / 1024))
        except OSError:
            continue
    return runners


def main():
    """Run the benchmark and print the results."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_example_repository(directory / "git")
        script = directory / "script.json"
        import msgspec

        script.write_bytes(msgspec.json.encode(Script((Turn((Text("Hello."),)),))))
        idle = directory / "idle.json"
        idle.write_bytes(msgspec.json.encode(Script((Turn(faults=(Fault("hang", times=99),)),))))
        with (
            start_module("sandbox.demo.git_server", "--directory", str(directory / "git")) as git,
            start_module("sandbox.demo.scripted_model", "--script", str(script)) as model,
            start_module("sandbox.demo.scripted_model", "--script", str(idle)) as silent,
        ):
            url = f"{git['url']}/example.git"
            key = {"ANTHROPIC_API_KEY": "scripted"}
            with start_server(directory / "data", {"ANTHROPIC_BASE_URL": model["url"], **key}) as server:
                measure_speed(server["http"], url, rounds)
            capacity = {"SANDBOX_CAPACITY_CPUS": "100"}
            with start_server(directory / "idle", {"ANTHROPIC_BASE_URL": silent["url"], **key, **capacity}) as server:
                measure_memory(server, url)


def measure_speed(server, url, rounds):
    """Run tasks one after the other. Before each task, start the agent without a sandbox."""
    timings = {"submit to running": [], "clone": [], "sandbox": [], "whole task": [], "bare claude --version": []}
    with Client(server) as client:
        run_task(client, url, "warm-up")
        for number in range(rounds):
            begin = time.perf_counter()
            subprocess.run([find_binary(), "--version"], check=True, capture_output=True)
            timings["bare claude --version"].append(time.perf_counter() - begin)
            states = run_task(client, url, number)
            timings["submit to running"].append(seconds_between(states, "pending", "running"))
            timings["clone"].append(seconds_between(states, "staging", "provisioning"))
            timings["sandbox"].append(seconds_between(states, "provisioning", "running"))
            timings["whole task"].append(seconds_between(states, "pending", "completed"))
    baseline = statistics.median(timings["bare claude --version"])
    for name, values in timings.items():
        median = statistics.median(values)
        print(f"{name:24} median {median * 1000:7.1f} ms  max {max(values) * 1000:7.1f} ms  x{median / baseline:.1f}")


def measure_memory(server, url):
    """Run tasks whose model never responds, so their runners are idle: first one, then several."""
    names = [f"idle-{number}" for number in range(IDLE_TASKS)]
    with Client(server["http"]) as client:
        for number, name in enumerate(names):
            manifest = {
                "version": "1",
                "kind": "Task",
                "metadata": {"id": name, "name": "idle"},
                "repository": {"url": url, "branch": "main"},
                "vm": {"cpus": 1, "memory": "1G", "disk": "1G"},
                "claude": {"prompt": "Say hello."},
            }
            client.submit(json.dumps(manifest).encode(), "application/json")
            while client.status(name)["state"] != "running":
                time.sleep(0.1)
            if number in (0, IDLE_TASKS - 1):
                time.sleep(3)
                resident, proportional, private = map(
                    statistics.median, zip(*runner_memory(server["pid"]), strict=True)
                )
                text = f"{resident:.1f} MB resident, {proportional:.1f} MB proportional, {private:.1f} MB private"
                print(f"{number + 1} idle: each runner has {text}")
        for name in names:
            client.cancel(name, force=True)
            client.wait(name)


if __name__ == "__main__":
    main()
