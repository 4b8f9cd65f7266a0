"""A stopped runner would hold its journal's lock forever, so the watchdog pings runners and kills unresponsive ones."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from chaos import processes
from doubles.deployment import wait_until
from doubles.manifests import manifest
from doubles.server_components import ServerComponents
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.task_file_layout import runner_socket
from sandbox.journal.journals import FileJournals
from sandbox.model.events import TaskFinished
from sandbox.placements.local.placement import kill_lock_holder
from sandbox.placements.runner_client import LocalRunnerClient
from sandbox.store.sqlite import SqliteStore

RUNNER = "sandbox.bootstrap.runner"


@pytest.fixture
def journals(tmp_path):
    instance = FileJournals(tmp_path)
    writer = instance.create("task-1")
    writer.append(TaskFinished(), at=datetime.now(UTC))
    writer.close()
    return instance


@pytest.fixture
def process():
    """Start Python processes; kill them at the end of the test."""
    children = []

    def start(*arguments, pass_fds=()):
        children.append(subprocess.Popen([sys.executable, "-c", *arguments], pass_fds=pass_fds))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


def hold(journals, process, *arguments):
    """Start a process that inherits the lock, as a runner does."""
    writer = journals.open("task-1")
    holder = process("import time; time.sleep(600)", *arguments, pass_fds=(writer.lock_fd,))
    writer.close()
    return holder


@pytest.mark.parametrize("module", [RUNNER, "sandbox.wiring.runner"])
def test_stopped_runner_is_killed_and_its_lock_released(journals, process, module):
    runner = hold(journals, process, module)
    assert processes.stop(runner.pid)
    assert journals.lock_state("task-1") is LockState.HELD
    assert kill_lock_holder(journals.lock_path("task-1"))
    assert runner.wait(20) == -signal.SIGKILL
    assert journals.lock_state("task-1") is LockState.FREE


def test_processes_other_than_the_runner_of_the_task_are_not_killed(journals, process, tmp_path):
    """The runner of another task, a process that only opened the file, another lock holder and the caller survive."""
    journals.create("task-2").close()
    lock = tmp_path / "tasks" / "task-1" / "journal" / "lock"
    observer = process(f"import time; file = open({str(lock)!r}); time.sleep(600)", RUNNER)
    other_holder = hold(journals, process)
    assert not kill_lock_holder(journals.lock_path("task-1"))
    assert not kill_lock_holder(journals.lock_path("task-2"))
    other_holder.kill()
    other_holder.wait()
    wait_until(lambda: journals.lock_state("task-1") is LockState.FREE, description="the lock to be free")
    writer = journals.open("task-1")
    assert not kill_lock_holder(journals.lock_path("task-1"))
    writer.close()
    assert observer.poll() is None


OVERLAY_SCRIPT = """
set -e
mount -t tmpfs lower "$1/lower"
mount -t tmpfs upper "$1/upper"
mkdir "$1/upper/files" "$1/upper/work"
mount -t overlay -o lowerdir="$1/lower,upperdir=$1/upper/files,workdir=$1/upper/work" overlay "$1/data"
exec "$2" -c "$3" "$1/data"
"""
KILL_LOCK_HOLDER_PROGRAM = f"""
import subprocess, sys
from pathlib import Path
from sandbox.journal.journals import FileJournals
from sandbox.placements.local.placement import kill_lock_holder

journals = FileJournals(Path(sys.argv[1]))
lock = journals.create("task-1")
argv = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(600)", {RUNNER!r}]
runner = subprocess.Popen(argv, pass_fds=(lock.lock_fd,), stdout=subprocess.PIPE)
lock.close()
try:
    assert runner.stdout.readline()  # the arguments can be read only after exec
    assert kill_lock_holder(journals.lock_path("task-1"))
    assert runner.wait(20) == -9
finally:
    runner.kill()
    runner.wait()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_runner_is_found_on_an_overlay_file_system(tmp_path):
    for name in ("lower", "upper", "data"):
        (tmp_path / name).mkdir()
    argv = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        OVERLAY_SCRIPT,
        "sh",
        str(tmp_path),
        sys.executable,
        KILL_LOCK_HOLDER_PROGRAM,
    ]
    result = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


LISTENER_PROGRAM = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + ".part")
listener.listen(8)
os.rename(sys.argv[1] + ".part", sys.argv[1])
while True:
    caller = listener.accept()[0]
    caller.recv(100)
    caller.sendall(b'{"done":false}\\n')
"""


@contextlib.contextmanager
def filled_backlog(path):
    """Fill the socket's backlog with clients. asyncio then reports new connections as established, but writes fail."""
    with contextlib.ExitStack() as waiting:
        while True:
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)) == errno.EAGAIN:
                break
        yield


@pytest.mark.parametrize("clients", [lambda _: contextlib.nullcontext(), filled_backlog], ids=["none", "many"])
def test_stopped_runner_is_unresponsive_until_continued(process, tmp_path, monkeypatch, clients):
    monkeypatch.setattr("sandbox.placements.runner_client.CONTROL_REQUEST_TIMEOUT_SECONDS", 1.0)
    path = runner_socket(tmp_path, "abcdefghijkl")
    runner_client = LocalRunnerClient(path)
    runner = process(LISTENER_PROGRAM, str(path))
    wait_until(
        lambda: path.exists() and asyncio.run(runner_client.may_be_responsive()), description="the runner to listen"
    )
    os.kill(runner.pid, signal.SIGSTOP)
    with clients(path):
        wait_until(lambda: not asyncio.run(runner_client.may_be_responsive()), description="no response")
    os.kill(runner.pid, signal.SIGCONT)
    wait_until(lambda: asyncio.run(runner_client.may_be_responsive()), description="a response")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_server_without_free_descriptors_does_not_consider_the_runner_unresponsive(tmp_path, monkeypatch, number):
    async def raise_error(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("asyncio.open_unix_connection", raise_error)
    assert await LocalRunnerClient(runner_socket(tmp_path, "abcdefghijkl")).may_be_responsive()


@pytest.mark.parametrize("has_socket", [True, False], ids=["refuses connections", "has no socket"])
async def test_unreachable_runner_is_not_reported_as_unresponsive(tmp_path, has_socket):
    path = runner_socket(tmp_path, "abcdefghijkl")
    if has_socket:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    assert await LocalRunnerClient(path).may_be_responsive()


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.01)
    monkeypatch.setattr("sandbox.server.recovery.RUNNER_SILENCE_SECONDS", 0.02)
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


def count_pings_before_kills(components, may_be_responsive, *, pings_min, kills=1):
    """Return the number of pings before each kill, first of the runner, then of its finisher; empty without a kill.

    may_be_responsive: receives the number of a ping and returns whether the runner responds.
    pings_min, kills: the observation ends after this many pings, or after this many kills.
    """
    pings, pings_before_kills = [], []

    async def ping(attempt_id):
        pings.append(attempt_id)
        return may_be_responsive(len(pings))

    def kill_lock_holder(task_id):
        pings_before_kills.append(len(pings))
        components.placement.kill(task_id)
        return True

    async def scenario():
        components.placement.may_be_responsive, components.placement.kill_lock_holder = ping, kill_lock_holder
        async with components.server() as service:
            await service.submit(manifest("task-1"))
            await components.wait_for_launch("task-1")
            deadline = time.monotonic() + 20
            while len(pings) < pings_min and len(pings_before_kills) < kills and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            if pings_before_kills:
                await components.wait_for_launch("task-1", 2)
            return pings_before_kills

    return asyncio.run(scenario())


@pytest.mark.parametrize("pings_before_kills", [[5], [5, 10]], ids=["runner", "finisher after a killed runner"])
def test_process_is_killed_after_five_unanswered_pings(components, pings_before_kills):
    kills = len(pings_before_kills)
    found = count_pings_before_kills(components, lambda _: False, pings_min=20, kills=kills)
    assert found[:kills] == pings_before_kills


def test_runner_that_responds_occasionally_is_not_killed(components):
    assert count_pings_before_kills(components, lambda number: number % 5 == 0, pings_min=23) == []


async def test_runner_that_does_not_respond_and_is_not_found_is_logged_once(components, caplog):
    pings = []

    async def ping(attempt_id):
        pings.append(attempt_id)
        return False

    async def scenario():
        components.placement.may_be_responsive, components.placement.kill_lock_holder = ping, lambda _: False
        async with components.server() as service:
            await service.submit(manifest("task-1"))
            await components.wait_for_launch("task-1")
            deadline = time.monotonic() + 20
            while len(pings) < 9 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)

    await scenario()
    messages = [record.message for record in caplog.records if record.name == "sandbox.server.recovery"]
    assert messages == [
        f"The runner of attempt {pings[0]} did not respond 5 times: not killed, because no runner holds its journal"
    ]
