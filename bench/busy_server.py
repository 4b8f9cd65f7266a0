"""Measures a server with a hundred running tasks and followers, and thousands of pending and finished tasks.

Run with the project's Python: python bench/busy_server.py [RUNNING [WAITING [FINISHED]]]  (default: 100 1000 10000)

Runners and sandboxes are real; a fake agent prints two lines per second. At the end, the server is killed and
restarted, to measure how soon the new server follows every task again. On SIGTERM and SIGINT, the tasks are cancelled
before the benchmark ends. The latest results are in docs/benchmarks.md.
"""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from store_list import fill

from doubles.deployment import Deployment, make_repository, reply_turn, wait_until
from doubles.fake_agent import make_fake_agent
from doubles.reconnecting_sse_clients import ReconnectingClient

LINE_SECONDS, AGENT_SECONDS = 0.5, 900
ROUNDS = 500
TIMEOUT_SECONDS = 300


def resident_mb(pid):
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_seconds(pid):
    """Return the CPU time that a process has used; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / 100


def find_runners(data_dir):
    """Return the task of each runner, keyed by process id. A runner has the journal of its task open."""
    found = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if b"sandbox.bootstrap.runner" in (process / "cmdline").read_bytes():
                for descriptor in (process / "fd").iterdir():
                    path = descriptor.readlink()
                    if path.name == "records" and path.is_relative_to(data_dir / "tasks"):
                        found[int(process.name)] = path.relative_to(data_dir / "tasks").parts[0]
    return found


def milliseconds(values):
    """Format p50, p99 and the maximum."""
    ordered = sorted(values)
    return ", ".join(
        f"{name} {value * 1000:.1f} ms"
        for name, value in (
            ("p50", statistics.median(ordered)),
            ("p99", ordered[len(ordered) * 99 // 100]),
            ("max", ordered[-1]),
        )
    )


def start_timed_server(deployment):
    """Start a server with capacity for all tasks; return the seconds until it responded."""
    begin = time.monotonic()
    ports = (
        [deployment.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")]
        if deployment.server
        else (0, 0)
    )
    deployment.start_server(
        ports=ports,
        PYTHONPATH=str(deployment.directory / "agent"),
        SANDBOX_CAPACITY_CPUS="1000",
        SANDBOX_CAPACITY_DISK="1000",
        SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0",
        SANDBOX_LOG_LEVEL="error",
    )
    return time.monotonic() - begin


def print_usage(deployment, name, seconds=10.0):
    """Print the server's memory and CPU usage, and the CPU usage of the runners."""
    pid, runners = deployment.server.ready_message["pid"], find_runners(deployment.data_dir)
    begin, before = time.monotonic(), {one: cpu_seconds(one) for one in (pid, *runners)}
    time.sleep(seconds)
    elapsed_seconds = time.monotonic() - begin
    used = {one: (cpu_seconds(one) - before[one]) / elapsed_seconds for one in before}
    print(f"{name}: {resident_mb(pid):.0f} MB resident, {used[pid]:.1%} of a core", flush=True)
    if runners:
        total = sum(used[one] for one in runners)
        print(f"  {len(runners)} runners: {total:.0%} of a core, {total / len(runners):.2%} each", flush=True)


def count(deployment, state):
    """Return the server's count of tasks in a state."""
    return deployment.http.get(f"/api/v1/tasks?state={state}&limit=1").json()["total_count"]


def submit(deployment, names, cpus):
    """Submit small tasks; return the duration of each request."""
    durations = []
    for name in names:
        begin = time.monotonic()
        deployment.submit(name, vm={"cpus": cpus, "memory": "32M", "disk": "32M"})
        durations.append(time.monotonic() - begin)
    return durations


def follow(deployment, names):
    """Follow each task with one client. All clients run in one thread. Return the clients."""
    port = int(deployment.server.ready_message["http"].rpartition(":")[2])
    followers = [ReconnectingClient(port, name) for name in names]

    async def run():
        await asyncio.gather(*(one.follow() for one in followers), return_exceptions=True)

    threading.Thread(target=asyncio.run, args=(run(),), daemon=True).start()
    wait_until(lambda: all(one.started.is_set() for one in followers), TIMEOUT_SECONDS, "the followers")
    return followers


def time_status_requests(deployment, names):
    """Request the status of tasks one after the other; return the duration of each request."""
    durations = []
    for number in range(ROUNDS):
        begin = time.monotonic()
        assert deployment.http.get(f"/api/v1/tasks/{names[number % len(names)]}").status_code == 200
        durations.append(time.monotonic() - begin)
    return durations


def seconds_to_follow_again(deployment, names):
    """Return the seconds from `kill -9` until the server responds, and until it has new output from every task."""
    deployment.server.stop(signal.SIGKILL)
    begin = time.monotonic()
    responded = start_timed_server(deployment)
    before = {name: deployment.status(name)["progress"]["output_bytes"] for name in names}
    left = set(names)
    while left:
        assert time.monotonic() - begin < TIMEOUT_SECONDS, f"{len(left)} tasks are not followed"
        left = {name for name in left if deployment.status(name)["progress"]["output_bytes"] <= before[name]}
    return responded, time.monotonic() - begin


def cancel_all(deployment):
    """Cancel all tasks and wait for the end of their runners. Starts the server again if a signal has ended it too.

    If the server does not end the runners, they are killed.
    """
    if deployment.server is None:
        return
    try:
        try:
            _request_cancellations(deployment)
        except httpx2.TransportError:
            deployment.server.stop()
            start_timed_server(deployment)
            _request_cancellations(deployment)
        wait_until(lambda: not find_runners(deployment.data_dir), TIMEOUT_SECONDS, "the end of the runners")
    finally:
        for pid in find_runners(deployment.data_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _request_cancellations(deployment):
    with httpx2.Client(base_url=deployment.server.ready_message["http"], trust_env=False, timeout=60) as http:
        while waiting := http.get("/api/v1/tasks?state=pending&limit=1000").json()["tasks"]:
            for task in waiting:
                http.delete(f"/api/v1/tasks/{task['id']}")
        for task in find_runners(deployment.data_dir).values():
            http.delete(f"/api/v1/tasks/{task}?force=true")


def end_on_signals():
    """Raise SystemExit on the first SIGTERM or SIGINT, so that the tasks are cancelled before the process ends."""

    def end(number, _frame):
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def main():
    """Run the benchmark and print the results."""
    end_on_signals()
    running, waiting, finished = (
        int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 100), (2, 1000), (3, 10_000))
    )
    with tempfile.TemporaryDirectory(prefix="busy-server-") as directory:
        deployment = Deployment(Path(directory), forks=False)
        make_repository(deployment.repositories / "repo.git", {"README.md": "# Hi\n"})
        deployment.start_git()
        deployment.start_model(reply_turn())
        line = json.dumps({"type": "note", "text": "still at work"})
        make_fake_agent(deployment.directory / "agent", [(line, LINE_SECONDS)] * int(AGENT_SECONDS / LINE_SECONDS))
        deployment.data_dir.mkdir(mode=0o700)
        fill(deployment.data_dir / "index.sqlite", finished).close()
        names = [f"running-{number}" for number in range(running)]
        try:
            print(f"started with {finished} finished tasks: responds after {start_timed_server(deployment):.2f} s")
            print_usage(deployment, "idle")
            stored = count(deployment, "running")
            begin = time.monotonic()
            submit(deployment, names, 1)
            wait_until(lambda: count(deployment, "running") == stored + running, TIMEOUT_SECONDS, "all to run")
            print(f"{running} tasks are running after {time.monotonic() - begin:.1f} s")
            print_usage(deployment, f"{running} running")
            followers = follow(deployment, names)
            durations = submit(deployment, [f"waiting-{number}" for number in range(waiting)], 1999)
            print(f"{waiting} more submitted, which are pending: {milliseconds(durations)} each")
            print_usage(
                deployment, f"{running} running, {len(followers)} followers, {count(deployment, 'pending')} pending"
            )
            print(f"{ROUNDS} status requests under this load: {milliseconds(time_status_requests(deployment, names))}")
            responded, followed = seconds_to_follow_again(deployment, names)
            print(f"after kill -9: responds after {responded:.2f} s, follows all {running} after {followed:.2f} s")
            print_usage(deployment, "the next server")
        finally:
            try:
                cancel_all(deployment)
            finally:
                deployment.close()


if __name__ == "__main__":
    main()
