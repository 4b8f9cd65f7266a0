"""A runner that is stopped holds its journal's lock for ever; it is asked, and killed when it never answers."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from chaos import processes
from doubles.live_server import until
from doubles.manifests import manifest
from doubles.server_components import Rooms
from sandbox.interfaces.layout import runner_socket
from sandbox.journal.journals import FileJournals
from sandbox.placements.local.runner_client import UnixRunnerClient
from sandbox.store.sqlite import SqliteStore

RUNNER = "sandbox.bootstrap.runner"


@pytest.fixture
def journals(tmp_path):
    made = FileJournals(tmp_path)
    made.create("task-1").close()
    return made


@pytest.fixture
def process():
    """Starts a program; all end with the test."""
    started = []

    def start(*words, pass_fds=()):
        started.append(subprocess.Popen([sys.executable, "-c", *words], pass_fds=pass_fds))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def hold(journals, process, *words):
    """As a server does: the lock goes with the process that it starts."""
    writer = journals.open("task-1")
    holder = process("import time; time.sleep(600)", *words, pass_fds=(writer.lock_fd,))
    writer.close()
    return holder


@pytest.mark.parametrize("module", [RUNNER, "sandbox.wiring.runner"])
def test_a_stopped_runner_of_this_or_an_earlier_version_is_killed_and_the_lock_is_free(journals, process, module):
    runner = hold(journals, process, module)
    assert processes.stop(runner.pid)
    assert journals.is_locked("task-1")
    assert journals.kill_lock_holder("task-1")
    assert runner.wait(20) == -signal.SIGKILL
    assert not journals.is_locked("task-1")


def test_nobody_else_is_killed(journals, process, tmp_path):
    """Not a runner of another task, not who only looks, not who holds the lock and is no runner, and not oneself."""
    journals.create("task-2").close()
    lock = tmp_path / "tasks" / "task-1" / "journal" / "lock"
    looks_on = process(f"import time; file = open({str(lock)!r}); time.sleep(600)", RUNNER)
    mends = hold(journals, process)
    assert not journals.kill_lock_holder("task-1")
    assert not journals.kill_lock_holder("task-2")
    mends.kill()
    mends.wait()
    until(lambda: not journals.is_locked("task-1"), what="the lock to be free")
    writer = journals.open("task-1")
    assert not journals.kill_lock_holder("task-1")
    writer.close()
    assert looks_on.poll() is None


OVERLAY = """
set -e
mount -t tmpfs lower "$1/lower"
mount -t tmpfs upper "$1/upper"
mkdir "$1/upper/files" "$1/upper/work"
mount -t overlay -o lowerdir="$1/lower,upperdir=$1/upper/files,workdir=$1/upper/work" overlay "$1/data"
exec "$2" -c "$3" "$1/data"
"""
EVICTION = f"""
import subprocess, sys
from pathlib import Path
from sandbox.journal.journals import FileJournals

journals = FileJournals(Path(sys.argv[1]))
lock = journals.create("task-1")
argv = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)", {RUNNER!r}]
runner = subprocess.Popen(argv, pass_fds=(lock.lock_fd,), stdout=subprocess.PIPE)
lock.close()
try:
    assert runner.stdout.readline()  # until a program has begun its arguments cannot be read
    assert journals.kill_lock_holder("task-1")
    assert runner.wait(20) == -9
finally:
    runner.kill()
    runner.wait()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
def test_a_runner_is_found_where_files_and_locks_have_different_devices(tmp_path):
    for name in ("lower", "upper", "data"):
        (tmp_path / name).mkdir()
    argv = ["unshare", "--mount", "sh", "-c", OVERLAY, "sh", str(tmp_path), sys.executable, EVICTION]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


LISTENER = """
import os, socket, sys, time
ear = socket.socket(socket.AF_UNIX)
ear.bind(sys.argv[1] + ".part")
ear.listen(8)
os.rename(sys.argv[1] + ".part", sys.argv[1])
while True:
    caller = ear.accept()[0]
    caller.recv(100)
    caller.sendall(b'{"done":false}\\n')
"""


def test_a_stopped_runner_does_not_answer_and_a_waking_one_does(process, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.placements.local.runner_client.CONTROL_SECONDS", 1.0)
    path, runners = runner_socket(tmp_path, "abcdefghijkl"), UnixRunnerClient(tmp_path)
    runner = process(LISTENER, str(path))
    until(lambda: path.exists() and asyncio.run(runners.is_responsive("abcdefghijkl")), what="the runner to listen")
    os.kill(runner.pid, signal.SIGSTOP)
    until(lambda: not asyncio.run(runners.is_responsive("abcdefghijkl")), what="silence")
    os.kill(runner.pid, signal.SIGCONT)
    until(lambda: asyncio.run(runners.is_responsive("abcdefghijkl")), what="an answer")


def test_a_stopped_runner_does_not_answer_however_many_wait_for_it(process, tmp_path, monkeypatch):
    """Past its backlog a connection seems to be made, and what is written to it fails."""
    monkeypatch.setattr("sandbox.placements.local.runner_client.CONTROL_SECONDS", 1.0)
    path, runners = runner_socket(tmp_path, "abcdefghijkl"), UnixRunnerClient(tmp_path)
    runner = process(LISTENER, str(path))
    until(lambda: path.exists() and asyncio.run(runners.is_responsive("abcdefghijkl")), what="the runner to listen")
    os.kill(runner.pid, signal.SIGSTOP)
    with contextlib.ExitStack() as waiting:
        while True:
            caller = waiting.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            if caller.connect_ex(str(path)) == errno.EAGAIN:
                break
        assert not asyncio.run(runners.is_responsive("abcdefghijkl"))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_runner_is_not_blamed_for_what_the_server_lacks_to_ask_it(tmp_path, monkeypatch, number):
    async def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("asyncio.open_unix_connection", refuse)
    assert asyncio.run(UnixRunnerClient(tmp_path).is_responsive("abcdefghijkl"))


def test_where_nobody_listens_any_more_nobody_is_blamed(tmp_path):
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(str(runner_socket(tmp_path, "abcdefghijkl")))
    assert asyncio.run(UnixRunnerClient(tmp_path).is_responsive("abcdefghijkl"))


def test_where_there_is_no_socket_nobody_is_blamed(tmp_path):
    assert asyncio.run(UnixRunnerClient(tmp_path).is_responsive("abcdefghijkl"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("sandbox.server.watchdog.RUNNER_SILENCE_SECONDS", 0.02)
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def play(world, answers, *, until_asked):
    """How often it was asked by the time it was evicted, and whether it was."""
    asked, evicted = [], []

    async def answer(attempt_id):
        asked.append(attempt_id)
        return answers(len(asked))

    def evict(task_id):
        evicted.append(len(asked))
        world.runners.die(task_id)
        return True

    async def story():
        world.runners.is_responsive, world.journals.kill_lock_holder = answer, evict
        async with world.server() as service:
            await service.submit(manifest("task-1"))
            await world.launched("task-1")
            deadline = time.monotonic() + 20
            while len(asked) < until_asked and not evicted and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            if evicted:
                await world.launched("task-1", 2)
            return evicted

    return asyncio.run(story())


def test_a_silent_runner_that_does_not_answer_five_times_is_killed_and_its_task_goes_on(world):
    assert play(world, lambda _: False, until_asked=20) == [5]


def test_one_that_answers_now_and_then_works_and_is_left_alone(world):
    assert play(world, lambda number: number % 5 == 0, until_asked=23) == []


def test_a_silent_runner_that_is_not_found_is_told_once(world, caplog):
    asked = []

    async def answer(attempt_id):
        asked.append(attempt_id)
        return False

    async def story():
        world.runners.is_responsive, world.journals.kill_lock_holder = answer, lambda _: False
        async with world.server() as service:
            await service.submit(manifest("task-1"))
            await world.launched("task-1")
            deadline = time.monotonic() + 20
            while len(asked) < 9 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)

    asyncio.run(story())
    told = [record.message for record in caplog.records if record.name == "sandbox.server.watchdog"]
    assert told == [f"The runner of attempt {asked[0]} did not answer 5 times: not killed, no runner holds its journal"]
