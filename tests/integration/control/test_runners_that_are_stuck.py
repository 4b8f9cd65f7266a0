"""A runner that is stopped holds its journal's lock for ever; it is asked, and killed when it never answers."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from chaos import processes
from doubles.live import until
from doubles.manifests import manifest
from doubles.server_rooms import Rooms
from sandbox.contracts.layout import runner_socket
from sandbox.journal.journals import FileJournals
from sandbox.placement.control import UnixRunnerControl
from sandbox.stores.sqlite import SqliteStore

RUNNER = "sandbox.wiring.runner"


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


def test_the_stopped_runner_that_holds_the_lock_is_killed_and_the_lock_is_free(journals, process):
    runner = hold(journals, process, RUNNER)
    assert processes.stop(runner.pid)
    assert journals.is_held("task-1")
    assert journals.evict("task-1")
    assert runner.wait(20) == -signal.SIGKILL
    assert not journals.is_held("task-1")


def test_nobody_else_is_killed(journals, process, tmp_path):
    """Not a runner of another task, not who only looks, not who holds the lock and is no runner, and not oneself."""
    journals.create("task-2").close()
    lock = tmp_path / "tasks" / "task-1" / "journal" / "lock"
    looks_on = process(f"import time; file = open({str(lock)!r}); time.sleep(600)", RUNNER)
    mends = hold(journals, process)
    assert not journals.evict("task-1")
    assert not journals.evict("task-2")
    mends.kill()
    mends.wait()
    until(lambda: not journals.is_held("task-1"), what="the lock to be free")
    writer = journals.open("task-1")
    assert not journals.evict("task-1")
    writer.close()
    assert looks_on.poll() is None


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
    monkeypatch.setattr("sandbox.placement.control.CONTROL_SECONDS", 1.0)
    socket, runners = runner_socket(tmp_path, "abcdefghijkl"), UnixRunnerControl(tmp_path)
    runner = process(LISTENER, str(socket))
    until(lambda: socket.exists() and asyncio.run(runners.answers("abcdefghijkl")), what="the runner to listen")
    os.kill(runner.pid, signal.SIGSTOP)
    until(lambda: not asyncio.run(runners.answers("abcdefghijkl")), what="silence")
    os.kill(runner.pid, signal.SIGCONT)
    until(lambda: asyncio.run(runners.answers("abcdefghijkl")), what="an answer")


def test_where_there_is_no_socket_nobody_is_blamed(tmp_path):
    assert asyncio.run(UnixRunnerControl(tmp_path).answers("abcdefghijkl"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("sandbox.control.watch.RUNNER_SILENCE_SECONDS", 0.02)
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
        world.runners.answers, world.journals.evict = answer, evict
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
