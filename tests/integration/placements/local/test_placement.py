"""A runner is started with its order, its lock and nothing else, and it outlives whoever started it."""

import asyncio
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.placement import LaunchOrder
from sandbox.placements.local import placement as local_placement
from sandbox.placements.local.placement import LocalPlacement

SECONDS = 20
RUNNER = """
import json, os, pathlib, sys, time
order = sys.stdin.read()
run_dir = pathlib.Path(json.loads(order)["run_dir"])
told = {
    "pid": os.getpid(), "argv": sys.argv[1:], "order": order, "cwd": os.getcwd(), "environment": dict(os.environ),
    "session": os.getsid(0), "files": {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
    if os.path.lexists(f"/proc/self/fd/{n}")},
}
print("to stdout")
print("to stderr", file=sys.stderr)
(run_dir / "told.tmp").write_text(json.dumps(told))
(run_dir / "told.tmp").rename(run_dir / "told")
deadline = time.monotonic() + 60
while not (run_dir / "go").exists() and time.monotonic() < deadline:
    time.sleep(0.005)
"""
SERVER = """
import asyncio, fcntl, os, pathlib, sys, time
from sandbox.interfaces.placement import LaunchOrder
from sandbox.placements.local.placement import LocalPlacement

directory = pathlib.Path(sys.argv[1])
lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock_fd, fcntl.LOCK_EX)
placement = LocalPlacement([sys.executable, "-I", str(directory / "runner.py")], {}, lambda _: directory / "log")
order = LaunchOrder("task-1", "a" * 12, str(directory), str(directory), "bubblewrap")

async def serve():
    await placement.launch(order, lock_fd)
    os.close(lock_fd)
    print("launched", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(serve())
"""


@pytest.fixture
def place(tmp_path):
    """The directory that the little runner works in; it is told to end when the test does."""
    (tmp_path / "runner.py").write_text(RUNNER)
    yield tmp_path
    (tmp_path / "go").touch()


@pytest.fixture
def lock_fd(place):
    lock_fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    yield lock_fd
    os.close(lock_fd)


def order_for(place, api_key="key"):
    upstream = ModelUpstream("https://model.example.org", api_key=api_key)
    return LaunchOrder("task-1", "a" * 12, str(place), str(place), "bubblewrap", upstream)


def placement_of(place, code=None, environment=None):
    if code is not None:
        (place / "runner.py").write_text(code)
    return LocalPlacement([sys.executable, "-I", str(place / "runner.py")], environment or {}, lambda _: place / "log")


async def until(condition):
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)
    return value


async def hear(place):
    await until((place / "told").exists)
    return json.loads((place / "told").read_text())


def is_held(place):
    with (place / "lock").open() as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def exists(pid):
    """Also for a zombie."""
    return Path(f"/proc/{pid}").exists()


def open_descriptors():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def children():
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_runner_gets_its_order_its_lock_and_nothing_else(place, lock_fd, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-the-server")
    leak_fd = os.open(place, os.O_RDONLY)

    async def launch():
        await placement_of(place, environment={"HOME": "/nowhere"}).launch(order_for(place), lock_fd)
        return await hear(place)

    told = asyncio.run(launch())
    os.close(leak_fd)

    order = order_for(place)
    assert json.loads(told["order"]) == {
        "task_id": "task-1",
        "attempt_id": order.attempt_id,
        "data_dir": str(place),
        "run_dir": str(place),
        "runtime": "bubblewrap",
        "upstream": {"base_url": "https://model.example.org", "api_key": "key"},
    }
    [argument] = told["argv"]
    name, number = argument.split("=")
    files = {int(fd): target for fd, target in told["files"].items() if int(fd) > 2 and "/proc/" not in target}
    assert (name, files) == ("--lock-fd", {int(number): str(place / "lock")})
    assert {**told["environment"], "LC_CTYPE": ""} == {"HOME": "/nowhere", "LC_CTYPE": ""}
    assert told["cwd"] == "/"
    assert told["session"] == told["pid"]


def test_what_a_runner_says_is_added_to_its_log(place, lock_fd):
    (place / "go").touch()

    async def launch_twice():
        for _ in range(2):
            await placement_of(place).launch(order_for(place), lock_fd)
            told = await hear(place)
            await until(lambda told=told: not exists(told["pid"]))
            (place / "told").unlink()

    asyncio.run(launch_twice())

    assert sorted((place / "log").read_text().split("\n")) == ["", *["to stderr"] * 2, *["to stdout"] * 2]
    assert stat.S_IMODE((place / "log").stat().st_mode) == 0o600


def test_a_runner_that_ends_leaves_no_zombie(place, lock_fd):
    async def launch():
        await placement_of(place).launch(order_for(place), lock_fd)
        told = await hear(place)
        assert exists(told["pid"])
        (place / "go").touch()
        await until(lambda: not exists(told["pid"]))

    before = open_descriptors()
    asyncio.run(launch())
    assert open_descriptors() == before


def test_the_runner_holds_the_lock_when_the_caller_has_closed_it(place):
    lock_fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)

    async def launch():
        await placement_of(place).launch(order_for(place), lock_fd)
        os.close(lock_fd)
        await hear(place)
        assert is_held(place)
        (place / "go").touch()
        await until(lambda: not is_held(place))

    asyncio.run(launch())


@pytest.mark.parametrize("end", ["goes", "is killed"])
def test_a_runner_outlives_its_server(place, end):
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", SERVER, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"launched\n"
        told = asyncio.run(hear(place))
        if end == "is killed":
            os.kill(server.pid, signal.SIGKILL)
        _, complaints = server.communicate(b"\n", timeout=SECONDS)
    assert (server.returncode, complaints) == (-signal.SIGKILL if end == "is killed" else 0, b"")

    assert exists(told["pid"])
    assert is_held(place)
    (place / "go").touch()
    asyncio.run(until(lambda: not is_held(place)))


def test_a_large_order_arrives_while_the_loop_goes_on(place, lock_fd):
    slow = "import time\ntime.sleep(0.3)\n" + RUNNER
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def launch():
        ticking = asyncio.create_task(tick())
        await placement_of(place, slow).launch(order_for(place, "k" * 300_000), lock_fd)
        ticking.cancel()
        return await hear(place)

    told = asyncio.run(launch())

    assert json.loads(told["order"])["upstream"]["api_key"] == "k" * 300_000
    assert len(ticks) > 5


@pytest.mark.parametrize(
    ("code", "error"),
    [("", BrokenPipeError), ("import time; time.sleep(60)", TimeoutError)],
    ids=["dies first", "never reads"],
)
def test_a_runner_that_does_not_take_its_order_is_ended_and_told(place, lock_fd, monkeypatch, code, error):
    monkeypatch.setattr(local_placement, "ORDER_SECONDS", 0.5 if error is TimeoutError else SECONDS)
    before = children()

    async def launch():
        with pytest.raises(error, match="did not take its order") as refused:
            await placement_of(place, code).launch(order_for(place, "k" * 300_000), lock_fd)
        await until(lambda: children() <= before)
        return refused.value

    assert str(place / "log") in str(asyncio.run(launch()))


def test_a_command_that_is_not_there_is_told_and_keeps_nothing_open(place, lock_fd):
    before = open_descriptors()
    missing = LocalPlacement([str(place / "none")], {}, lambda _: place / "log")
    unwritable = LocalPlacement([sys.executable], {}, lambda _: place / "none" / "log")

    for placement in (missing, unwritable):
        with pytest.raises(FileNotFoundError):
            asyncio.run(placement.launch(order_for(place), lock_fd))
    assert open_descriptors() == before


def test_a_caller_that_is_cancelled_may_close_its_lock(place):
    lock_fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)

    async def launch():
        launching = asyncio.create_task(placement_of(place).launch(order_for(place), lock_fd))
        await asyncio.sleep(0)
        launching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launching
        os.close(lock_fd)
        told = await hear(place)
        assert is_held(place)
        (place / "go").touch()
        await until(lambda: not exists(told["pid"]))

    asyncio.run(launch())
    assert not is_held(place)


@pytest.mark.parametrize("step", ["os.pipe", "the log"])
def test_a_machine_without_descriptors_or_room_costs_neither_the_lock_nor_a_descriptor(
    place, lock_fd, monkeypatch, step
):
    def refuse(*_):
        raise OSError("no more")

    async def launch():
        placement = LocalPlacement(["true"], {}, refuse if step == "the log" else lambda _: place / "log")
        if step == "os.pipe":
            monkeypatch.setattr("sandbox.placements.local.placement.os.pipe", refuse)
        before = open_descriptors()
        with pytest.raises(OSError, match="no more"):
            await placement.launch(order_for(place), lock_fd)
        monkeypatch.undo()
        assert open_descriptors() == before

    asyncio.run(launch())


def test_a_runner_that_no_descriptor_is_left_for_is_ended_and_leaves_no_zombie(place, lock_fd, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    async def launch():
        with pytest.raises(OSError, match="Too many open files"):
            await placement_of(place, "import time; time.sleep(60)").launch(order_for(place), lock_fd)
        await until(lambda: children() <= before)

    monkeypatch.setattr("sandbox.placements.local.placement.os.pidfd_open", refuse)
    before = children()
    asyncio.run(launch())
