"""A runner receives only its order and its lock, and outlives its server."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandbox.disks.commands import remove_trees
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptLocation
from sandbox.interfaces.runner import (
    CancelAttempt,
    RunAttempt,
    RunDebugSession,
    RunnerNotStartedError,
    RunnerUnreachableError,
)
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.model.events import TaskFinished
from sandbox.model.fixed_limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT
from sandbox.placements.local import placement as local_placement
from sandbox.placements.local.attempt_files import LocalAttemptFiles
from sandbox.placements.local.placement import LocalPlacement, LocalPreservedDisk
from sandbox.placements.local.runner_starters import RunnerForkServer, RunnerSettings, RunnerSpawner

TIMEOUT_SECONDS = 20
RUNNER_PROGRAM = """
import json, os, pathlib, sys, time
order = sys.stdin.read()
run_dir = pathlib.Path(json.loads(order)["host"]["run_dir"])
report = {
    "pid": os.getpid(), "argv": sys.argv[1:], "order": order, "cwd": os.getcwd(), "environment": dict(os.environ),
    "session": os.getsid(0), "files": {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
    if os.path.lexists(f"/proc/self/fd/{n}")},
}
print("to stdout")
print("to stderr", file=sys.stderr)
(run_dir / "report.tmp").write_text(json.dumps(report))
(run_dir / "report.tmp").rename(run_dir / "report")
deadline = time.monotonic() + 60
while not (run_dir / "go").exists() and time.monotonic() < deadline:
    time.sleep(0.005)
"""
FORK_PROGRAM = """
import socket, sys
from sandbox.bootstrap.runner_fork_server import fork_runners
[argument] = sys.argv[1:]
lock_fd = fork_runners(socket.socket(fileno=int(argument.removeprefix("--control-fd="))))
sys.argv[1:] = [f"--lock-fd={lock_fd}"]
"""
"""Makes the fake runner a fork server."""
SERVER_PROGRAM = """
import asyncio, contextlib, fcntl, os, pathlib, sys, time
from types import SimpleNamespace
from sandbox.interfaces.runner import RunAttempt
from sandbox.placements.local.runner_starters import RunnerSettings
from sandbox.placements.local.placement import LocalPlacement
from sandbox.placements.local.runner_starters import RunnerForkServer, RunnerSpawner

directory = pathlib.Path(sys.argv[1])
lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock_fd, fcntl.LOCK_EX)
command = [sys.executable, "-I", str(directory / "runner.py")]
settings = RunnerSettings(str(directory), str(directory), "bubblewrap")
locks = SimpleNamespace(hand_over=contextlib.nullcontext)
starter = RunnerForkServer(command, {}) if sys.argv[2] == "forked" else RunnerSpawner(command, {})
placement = LocalPlacement(starter, directory, directory, None, lambda: settings, locks, None)
order = RunAttempt("task-1", "a" * 12)

async def serve():
    running = asyncio.create_task(placement.run())
    await placement.launch(order, lock_fd)
    os.close(lock_fd)
    print("launched", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(serve())
"""


@pytest.fixture
def run_dir(tmp_path):
    """The directory of the fake runner, which exits at the end of the test."""
    (tmp_path / "runner.py").write_text(RUNNER_PROGRAM)
    yield tmp_path
    (tmp_path / "go").touch()


@pytest.fixture(params=["spawned", "forked"])
def start_method(request):
    """How runners start: as new processes, or as forks of a fork server."""
    return request.param


@pytest.fixture
def forking_placement(run_dir):
    """A placement whose fork server ends at the end of the test."""
    placement = placement_of(run_dir, start_method="forked")
    yield placement
    placement._starter.close()


@pytest.fixture
def lock_fd(run_dir):
    lock_fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    yield lock_fd
    os.close(lock_fd)


def order_for(run_dir, api_key="key"):
    upstream = ModelUpstream("https://model.example.org", api_key=api_key)
    return RunAttempt("task-1", "a" * 12, upstream)


def log_of(run_dir):
    return TaskLayout(run_dir, "task-1").attempt("a" * 12).runner_log


def make_placement(run_dir, starter):
    """Return a placement that accepts file descriptors instead of journal writers."""
    settings = RunnerSettings(str(run_dir), str(run_dir), "bubblewrap")
    locks = SimpleNamespace(hand_over=contextlib.nullcontext)
    return LocalPlacement(starter, run_dir, run_dir, None, lambda: settings, locks, files_of(run_dir))


def files_of(run_dir):
    return LocalAttemptFiles(run_dir, (), remove_trees)


def placement_of(run_dir, code=RUNNER_PROGRAM, environment=None, *, start_method="spawned"):
    (run_dir / "runner.py").write_text((FORK_PROGRAM if start_method == "forked" else "") + code)
    command = [sys.executable, "-I", str(run_dir / "runner.py")]
    make_starter = RunnerForkServer if start_method == "forked" else RunnerSpawner
    return make_placement(run_dir, make_starter(command, environment or {}))


async def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition was not true in time"
        await asyncio.sleep(0.005)
    return value


async def wait_for_report(run_dir):
    await wait_until((run_dir / "report").exists)
    return json.loads((run_dir / "report").read_text())


def is_held(run_dir):
    with (run_dir / "lock").open() as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def exists(pid):
    """Return whether the process exists, possibly as a zombie."""
    return Path(f"/proc/{pid}").exists()


def open_descriptors():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def children():
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


async def test_runner_receives_only_its_order_and_lock(run_dir, lock_fd, monkeypatch, start_method):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-the-server")
    leak_fd = os.open(run_dir, os.O_RDONLY)
    placement = placement_of(run_dir, environment={"HOME": "/nowhere"}, start_method=start_method)
    running = asyncio.create_task(placement.run())
    if start_method == "forked":  # the second runner must not inherit anything that belongs to the first
        await placement.launch(order_for(run_dir), lock_fd)
        await wait_for_report(run_dir)
        (run_dir / "report").unlink()
    await placement.launch(order_for(run_dir), lock_fd)
    report = await wait_for_report(run_dir)
    os.close(leak_fd)
    running.cancel()

    order = order_for(run_dir)
    assert json.loads(report["order"]) == {
        "order": {
            "type": "run_attempt",
            "task_id": "task-1",
            "attempt_id": order.attempt_id,
            "upstream": {"base_url": "https://model.example.org", "api_key": "key"},
            "image": None,
            "secrets": {},
            "resumes": False,
            "follow_redirects": True,
            "records_conversation": True,
            "keeps_session": False,
        },
        "host": {
            "data_dir": str(run_dir),
            "run_dir": str(run_dir),
            "runtime": "bubblewrap",
            "excludes_emulation": False,
            "agent_programs": {},
            "disk_kind": "plain",
            "can_confine": False,
            "output_watermark": {"percent": OUTPUT_FREE_PERCENT, "bytes_max": OUTPUT_FREE_BYTES},
            "lease_deadline": None,
        },
    }
    [argument] = report["argv"]
    name, number = argument.split("=")
    files = {int(fd): target for fd, target in report["files"].items() if int(fd) > 2 and "/proc/" not in target}
    assert (name, files) == ("--lock-fd", {int(number): str(run_dir / "lock")})
    assert {**report["environment"], "LC_CTYPE": ""} == {"HOME": "/nowhere", "LC_CTYPE": ""}
    assert report["cwd"] == "/"
    assert report["session"] == report["pid"]


async def test_output_of_a_runner_is_appended_to_its_log(run_dir, lock_fd):
    (run_dir / "go").touch()

    async def launch_twice():
        for _ in range(2):
            await placement_of(run_dir).launch(order_for(run_dir), lock_fd)
            report = await wait_for_report(run_dir)
            await wait_until(lambda report=report: not exists(report["pid"]))
            (run_dir / "report").unlink()

    await launch_twice()

    assert sorted(log_of(run_dir).read_text().split("\n")) == ["", *["to stderr"] * 2, *["to stdout"] * 2]
    assert stat.S_IMODE(log_of(run_dir).stat().st_mode) == 0o600


async def test_exited_runner_leaves_no_zombie(run_dir, lock_fd):
    async def launch():
        await placement_of(run_dir).launch(order_for(run_dir), lock_fd)
        report = await wait_for_report(run_dir)
        assert exists(report["pid"])
        (run_dir / "go").touch()
        await wait_until(lambda: not exists(report["pid"]))

    before = open_descriptors()
    await launch()
    assert open_descriptors() == before


async def test_runner_holds_the_lock_after_the_caller_closed_it(run_dir):
    lock_fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    await placement_of(run_dir).launch(order_for(run_dir), lock_fd)
    os.close(lock_fd)
    await wait_for_report(run_dir)
    assert is_held(run_dir)
    (run_dir / "go").touch()
    await wait_until(lambda: not is_held(run_dir))


@pytest.mark.parametrize("end", ["exits", "is killed"])
def test_runner_outlives_its_server(run_dir, end, start_method):
    placement_of(run_dir, start_method=start_method)
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", SERVER_PROGRAM, str(run_dir), start_method]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"launched\n"
        report = asyncio.run(wait_for_report(run_dir))
        if end == "is killed":
            os.kill(server.pid, signal.SIGKILL)
        _, stderr = server.communicate(b"\n", timeout=TIMEOUT_SECONDS)
    # In debug mode, asyncio would report each slow step on a busy machine.
    messages = [line for line in stderr.splitlines() if not line.startswith(b"Executing ")]
    assert (server.returncode, messages) == (-signal.SIGKILL if end == "is killed" else 0, [])

    assert exists(report["pid"])
    assert is_held(run_dir)
    (run_dir / "go").touch()
    asyncio.run(wait_until(lambda: not is_held(run_dir)))


async def test_fork_server_ends_with_its_placement_and_runners_continue(forking_placement, run_dir, lock_fd):
    running = asyncio.create_task(forking_placement.run())
    await forking_placement.launch(order_for(run_dir), lock_fd)
    runner = (await wait_for_report(run_dir))["pid"]
    [fork_server] = children() & {parent_of(runner)}
    running.cancel()
    await asyncio.wait({running})
    assert not exists(fork_server)
    assert exists(runner)


async def test_fork_server_reaps_its_runners(forking_placement, run_dir, lock_fd):
    await forking_placement.launch(order_for(run_dir), lock_fd)
    runner = (await wait_for_report(run_dir))["pid"]
    fork_server, before = parent_of(runner), open_descriptors()
    descriptors_before = len(list(Path(f"/proc/{fork_server}/fd").iterdir()))
    (run_dir / "go").touch()
    await wait_until(lambda: not exists(runner))
    await wait_until(lambda: len(list(Path(f"/proc/{fork_server}/fd").iterdir())) == descriptors_before - 1)
    await wait_until(lambda: len(open_descriptors()) == len(before) - 1)  # the runner's pidfd


async def test_fork_server_does_not_hold_the_lock(forking_placement, run_dir):
    lock_fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    await forking_placement.launch(order_for(run_dir), lock_fd)
    os.close(lock_fd)
    runner = (await wait_for_report(run_dir))["pid"]
    assert is_held(run_dir)
    fork_server = parent_of(runner)
    os.kill(runner, signal.SIGKILL)
    await wait_until(lambda: not is_held(run_dir))
    assert exists(fork_server)


async def test_launch_after_the_death_of_the_fork_server_starts_another_one(forking_placement, run_dir, lock_fd):
    await forking_placement.launch(order_for(run_dir), lock_fd)
    first = parent_of((await wait_for_report(run_dir))["pid"])
    (run_dir / "report").unlink()
    os.kill(first, signal.SIGKILL)
    await wait_until(lambda: is_zombie(first))
    await forking_placement.launch(order_for(run_dir), lock_fd)
    assert parent_of((await wait_for_report(run_dir))["pid"]) != first
    assert not exists(first)


async def test_fork_server_that_does_not_respond_is_replaced(forking_placement, run_dir, lock_fd, monkeypatch):
    await forking_placement.launch(order_for(run_dir), lock_fd)
    first = parent_of((await wait_for_report(run_dir))["pid"])
    (run_dir / "report").unlink()
    forking_placement._starter._control.settimeout(0.2)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(RunnerNotStartedError) as caught:
        await forking_placement.launch(order_for(run_dir), lock_fd)
    assert caught.value.errno == errno.ETIMEDOUT
    assert not exists(first)
    assert not (run_dir / "report").exists()
    await forking_placement.launch(order_for(run_dir), lock_fd)
    assert (await wait_for_report(run_dir))["order"]


async def test_fork_server_that_ends_immediately_starts_no_runner(run_dir, lock_fd):
    placement = make_placement(run_dir, RunnerForkServer([sys.executable, "-I", "-c", ""], {}))
    before = children()
    with pytest.raises(RunnerNotStartedError) as caught:
        await placement.launch(order_for(run_dir), lock_fd)
    assert caught.value.errno == errno.EPIPE
    assert children() == before


@pytest.mark.parametrize(
    "fault",
    ["def fail(): raise BlockingIOError(errno.EAGAIN, '')\nos.fork = fail", "socket.recv_fds = lambda *_: os._exit(3)"],
    ids=["no process", "dies at once"],
)
async def test_fork_server_reports_that_no_runner_was_forked(run_dir, lock_fd, fault):
    placement = placement_of(run_dir, start_method="forked")
    program = (run_dir / "runner.py").read_text()
    (run_dir / "runner.py").write_text(f"import errno, os, socket\n{fault}\n{program}")
    before = open_descriptors()
    for _ in range(2):  # the fork server is still there
        with pytest.raises(RunnerNotStartedError) as caught:
            await placement.launch(order_for(run_dir), lock_fd)
        assert caught.value.errno == errno.EAGAIN
    placement._starter.close()
    assert open_descriptors() == before


async def test_forked_runner_whose_server_sends_no_order_exits(run_dir, lock_fd):
    fork_server = RunnerForkServer([sys.executable, "-I", "-m", "sandbox.bootstrap.runner_fork_server"], {})
    order_read_fd, order_write_fd = os.pipe()
    log_fd = os.open(run_dir / "log", os.O_WRONLY | os.O_CREAT)
    pidfd = await asyncio.to_thread(fork_server.start, "bubblewrap", order_read_fd, log_fd, lock_fd)
    for descriptor in (order_read_fd, order_write_fd, log_fd):
        os.close(descriptor)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert await asyncio.to_thread(poll.poll, TIMEOUT_SECONDS * 1000)
    os.close(pidfd)
    fork_server.close()
    assert "exited before it sent the order" in (run_dir / "log").read_text()


async def test_large_order_is_sent_without_blocking_the_loop(run_dir, lock_fd):
    slow_runner = "import time\ntime.sleep(0.3)\n" + RUNNER_PROGRAM
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def launch():
        ticker = asyncio.create_task(tick())
        await placement_of(run_dir, slow_runner).launch(order_for(run_dir, "k" * 300_000), lock_fd)
        ticker.cancel()
        return await wait_for_report(run_dir)

    report = await launch()

    assert json.loads(report["order"])["order"]["upstream"]["api_key"] == "k" * 300_000
    assert len(ticks) > 5


@pytest.mark.parametrize(
    ("code", "error_number"),
    [("", errno.EPIPE), ("import time; time.sleep(60)", errno.ETIMEDOUT)],
    ids=["exits first", "never reads"],
)
async def test_runner_that_does_not_read_its_order_is_killed(run_dir, lock_fd, monkeypatch, code, error_number):
    monkeypatch.setattr(
        local_placement, "ORDER_TIMEOUT_SECONDS", 0.5 if error_number == errno.ETIMEDOUT else TIMEOUT_SECONDS
    )
    before = children()

    async def launch():
        with pytest.raises(RunnerNotStartedError, match="did not accept its order") as refused:
            await placement_of(run_dir, code).launch(order_for(run_dir, "k" * 300_000), lock_fd)
        assert refused.value.errno == error_number
        await wait_until(lambda: children() <= before)
        return refused.value

    assert str(log_of(run_dir)) in str(await launch())


def test_failed_start_leaves_no_open_descriptor(run_dir, lock_fd):
    before = open_descriptors()
    missing = make_placement(run_dir, RunnerSpawner([str(run_dir / "none")], {}))
    unwritable = make_placement(run_dir / "runner.py", RunnerSpawner([sys.executable], {}))

    for placement, error in ((missing, FileNotFoundError), (unwritable, NotADirectoryError)):
        with pytest.raises(error):
            asyncio.run(placement.launch(order_for(run_dir), lock_fd))
    assert open_descriptors() == before


async def test_cancelled_caller_can_close_its_lock(run_dir):
    lock_fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)

    async def launch():
        launch_task = asyncio.create_task(placement_of(run_dir).launch(order_for(run_dir), lock_fd))
        await asyncio.sleep(0)
        launch_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launch_task
        os.close(lock_fd)
        report = await wait_for_report(run_dir)
        assert is_held(run_dir)
        (run_dir / "go").touch()
        await wait_until(lambda: not exists(report["pid"]))

    await launch()
    assert not is_held(run_dir)


@pytest.mark.parametrize("step", ["os.pipe", "_create_log_directory"])
async def test_lack_of_descriptors_leaks_neither_lock_nor_descriptor(run_dir, lock_fd, monkeypatch, step):
    def refuse(*_):
        raise OSError("no descriptor")

    placement = make_placement(run_dir, RunnerSpawner(["true"], {}))
    monkeypatch.setattr(f"sandbox.placements.local.placement.{step}", refuse)
    before = open_descriptors()
    with pytest.raises(OSError, match="no descriptor"):
        await placement.launch(order_for(run_dir), lock_fd)
    monkeypatch.undo()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("error_number", "is_temporary"),
    [(number, True) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.ENFILE)]
    + [(number, False) for number in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)],
)
async def test_temporary_causes_of_a_failed_start_are_distinguished(
    run_dir, lock_fd, monkeypatch, error_number, is_temporary
):
    def refuse(*_, **__):
        raise OSError(error_number, "refused")

    monkeypatch.setattr("sandbox.placements.local.runner_starters.subprocess.Popen", refuse)
    with pytest.raises(OSError, match="refused") as refused:
        await make_placement(run_dir, RunnerSpawner(["true"], {})).launch(order_for(run_dir), lock_fd)
    assert (refused.value.errno, isinstance(refused.value, RunnerNotStartedError)) == (error_number, is_temporary)


async def test_runner_without_a_pidfd_is_killed_and_reaped(run_dir, lock_fd, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("sandbox.placements.local.runner_starters.os.pidfd_open", refuse)
    before = children()
    with pytest.raises(OSError, match="Too many open files"):
        await placement_of(run_dir, "import time; time.sleep(60)").launch(order_for(run_dir), lock_fd)
    await wait_until(lambda: children() <= before)


def preserved_disk(run_dir):
    disk = placement_of(run_dir).preserved_disk(AttemptLocation("task-1", "a" * 12, "renamed"))
    (log_of(run_dir).parent / "disk").mkdir(parents=True, exist_ok=True)
    return disk


async def test_preserved_disk_can_be_locked_by_one_user_at_a_time(run_dir):
    first, second = preserved_disk(run_dir), preserved_disk(run_dir)
    async with first.try_lock() as lock_state:
        assert lock_state is LockState.FREE
        async with second.try_lock() as other:
            assert other is LockState.HELD
    async with second.try_lock() as lock_state:
        assert lock_state is LockState.FREE


async def test_debug_session_holds_the_lock_of_its_disk(run_dir):
    disk, other = preserved_disk(run_dir), preserved_disk(run_dir)
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.FREE
        await disk.start_debug_session(RunDebugSession("task-1", "a" * 12))
    report = await wait_for_report(run_dir)
    assert json.loads(report["order"])["order"]["type"] == "debug_session"

    async def lock_state_now():
        async with other.try_lock() as found:
            return found

    assert await lock_state_now() is LockState.HELD
    (run_dir / "go").touch()
    while await lock_state_now() is not LockState.FREE:
        await asyncio.sleep(0.005)


def test_runner_of_an_earlier_server_is_found_before_the_host_is_probed(run_dir):
    def fail():
        raise AssertionError("the host has not been probed")

    locks = FileJournals(run_dir)
    placement = LocalPlacement(RunnerSpawner(["runner"], {}), run_dir, run_dir, None, fail, locks, files_of(run_dir))
    location = AttemptLocation("task-1", "a" * 12, "here")
    assert placement.find_runner(location).attempt_id == "a" * 12
    assert isinstance(placement.preserved_disk(location), LocalPreservedDisk)


async def test_handle_reports_and_kills_a_runner_of_an_earlier_server(run_dir):
    """A new server, which did not start the runner, gets a handle equivalent to that of the old server."""
    journals = FileJournals(run_dir)
    writer = journals.create("task-1")
    writer.append(TaskFinished(), at=datetime.now(UTC))
    settings = RunnerSettings(str(run_dir), str(run_dir), "bubblewrap")
    command = [sys.executable, "-I", str(run_dir / "runner.py"), "sandbox.bootstrap.runner"]

    def make():
        return LocalPlacement(
            RunnerSpawner(command, {}),
            run_dir,
            run_dir,
            None,
            lambda: settings,
            FileJournals(run_dir),
            files_of(run_dir),
        )

    launched = await make().launch(order_for(run_dir), writer)
    writer.close()
    await wait_for_report(run_dir)
    found = make().find_runner(AttemptLocation("task-1", "a" * 12, "renamed"))
    assert (launched.attempt_id, found.attempt_id) == ("a" * 12, "a" * 12)
    assert launched.lock_state() is found.lock_state() is LockState.HELD
    with pytest.raises(RunnerUnreachableError):
        await found.cancel(CancelAttempt())
    assert await found.may_be_responsive()  # a socket without a listener does not prove that the runner is stuck
    assert await found.kill()
    await wait_until(lambda: found.lock_state() is LockState.FREE)
    assert not await found.kill()
