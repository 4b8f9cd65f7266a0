"""A hundred tasks at once, a hundred followers, a thousand tasks that wait and ten thousand that are over.

Run with the project's Python: python bench/crowd.py [RUNNING [WAITING [FINISHED]]]    (100, 1000 and 10000 without)

Real runners and sandboxes; the agent is a stand-in that prints two lines a second. Then the server is killed, and
started again: how soon does it follow every task? docs/benchmarks.md has the last results.
"""

import asyncio
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from store_list import fill

from doubles.live_server import TERMINAL, Deployment, make_repository, reply, wait_until
from doubles.reconnecting_clients import ReconnectingClient
from doubles.stand_in_agent import make_fake_agent

LINE_SECONDS, LIFE_SECONDS = 0.5, 900
ROUNDS = 500
PATIENCE_SECONDS = 300


def resident_mb(pid):
    """Of one process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def processor_seconds(pid):
    """Used by one process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def milliseconds(values):
    """p50, p99 and the longest."""
    ordered = sorted(values)
    return ", ".join(
        f"{name} {value * 1000:.1f} ms"
        for name, value in (
            ("p50", statistics.median(ordered)),
            ("p99", ordered[len(ordered) * 99 // 100]),
            ("at most", ordered[-1]),
        )
    )


def started_server(world):
    """With room for all; gives how long it took to answer, in seconds."""
    begin = time.monotonic()
    ports = [world.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")] if world.server else (0, 0)
    world.start_server(
        ports=ports,
        PYTHONPATH=str(world.directory / "agent"),
        SANDBOX_CAPACITY_CPUS="1000",
        SANDBOX_CAPACITY_DISK="1000",
        SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0",
        SANDBOX_LOG_LEVEL="error",
    )
    return time.monotonic() - begin


def tell(world, name, seconds=5.0):
    """What the server weighs and uses."""
    pid, before = world.server.ready_message["pid"], processor_seconds(world.server.ready_message["pid"])
    time.sleep(seconds)
    used = (processor_seconds(pid) - before) / seconds
    print(f"{name}: {resident_mb(pid):.0f} MB resident, {used:.0%} of a core", flush=True)


def count(world, state):
    """Tasks in a state, as the server says."""
    return world.http.get(f"/api/v1/tasks?state={state}&limit=1").json()["total_count"]


def submit(world, names, cpus):
    """Small ones."""
    took = []
    for name in names:
        begin = time.monotonic()
        world.submit(name, vm={"cpus": cpus, "memory": "32M", "disk": "32M"})
        took.append(time.monotonic() - begin)
    return took


def follow(world, names):
    """One follower a task, in a thread of their own; gives them."""
    port = int(world.server.ready_message["http"].rpartition(":")[2])
    followers = [ReconnectingClient(port, name) for name in names]

    async def run():
        await asyncio.gather(*(one.follow() for one in followers), return_exceptions=True)

    threading.Thread(target=asyncio.run, args=(run(),), daemon=True).start()
    wait_until(lambda: all(one.started.is_set() for one in followers), PATIENCE_SECONDS, "the followers")
    return followers


def ask_for_status(world, names):
    """Many times, one after the other."""
    took = []
    for number in range(ROUNDS):
        begin = time.monotonic()
        assert world.http.get(f"/api/v1/tasks/{names[number % len(names)]}").status_code == 200
        took.append(time.monotonic() - begin)
    return took


def seconds_to_follow_again(world, names):
    """From `kill -9` until the server answers, and until it has seen every task print something since."""
    world.server.stop(signal.SIGKILL)
    begin = time.monotonic()
    answered = started_server(world)
    said = {name: world.status(name)["progress"]["output_bytes"] for name in names}
    left = set(names)
    while left:
        assert time.monotonic() - begin < PATIENCE_SECONDS, f"{len(left)} are not followed"
        left = {name for name in left if world.status(name)["progress"]["output_bytes"] <= said[name]}
    return answered, time.monotonic() - begin


def end(world, running):
    """All of them, those that wait first."""
    with httpx.Client(base_url=world.server.ready_message["http"], trust_env=False, timeout=60) as http:
        while waiting := http.get("/api/v1/tasks?state=pending&limit=1000").json()["tasks"]:
            for task in waiting:
                http.delete(f"/api/v1/tasks/{task['id']}")
        for name in running:
            http.delete(f"/api/v1/tasks/{name}?force=true")
        for name in running:
            wait_until(
                lambda name=name: http.get(f"/api/v1/tasks/{name}").json()["state"] in TERMINAL, PATIENCE_SECONDS, name
            )


def main():
    """Print the figures."""
    running, waiting, finished = (
        int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 100), (2, 1000), (3, 10_000))
    )
    with tempfile.TemporaryDirectory(prefix="crowd-") as directory:
        world = Deployment(Path(directory), forks=False)
        make_repository(world.repositories / "repo.git", {"README.md": "# Hi\n"})
        world.start_git()
        world.start_model(reply())
        line = json.dumps({"type": "note", "text": "still at work"})
        make_fake_agent(world.directory / "agent", [(line, LINE_SECONDS)] * int(LIFE_SECONDS / LINE_SECONDS))
        world.data_dir.mkdir(mode=0o700)
        fill(world.data_dir / "index.sqlite", finished).close()
        names = [f"crowd-{number}" for number in range(running)]
        try:
            print(f"started with {finished} finished tasks: it answers after {started_server(world):.2f} s")
            tell(world, "idle")
            begin = time.monotonic()
            submit(world, names, 1)
            wait_until(lambda: count(world, "running") == running, PATIENCE_SECONDS, "all to run")
            print(f"{running} tasks run after {time.monotonic() - begin:.1f} s")
            tell(world, f"{running} running")
            followers = follow(world, names)
            took = submit(world, [f"waiting-{number}" for number in range(waiting)], 1999)
            print(f"{waiting} more submitted, which wait: {milliseconds(took)} each")
            tell(world, f"{running} running, {len(followers)} followers, {count(world, 'pending')} waiting")
            print(f"status, asked {ROUNDS} times meanwhile: {milliseconds(ask_for_status(world, names))}")
            answered, followed = seconds_to_follow_again(world, names)
            print(f"after kill -9: answers after {answered:.2f} s, follows all {running} after {followed:.2f} s")
            tell(world, "the next server")
        finally:
            end(world, names)
            world.close()


if __name__ == "__main__":
    main()
