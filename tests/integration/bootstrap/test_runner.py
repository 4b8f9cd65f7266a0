"""The runner as a process, from its start until it has the journal."""

import os
import signal
import subprocess
import sys

import msgspec
import pytest

from doubles.manifests import manifest
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import Recorder, replay_task
from sandbox.interfaces.placement import LaunchOrder
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AttemptFailed, AttemptStarted, ErrorReported, TaskFinished, TaskSubmitted

IMPATIENT = """
import sandbox.model.limits
sandbox.model.limits.LAUNCH_SECONDS = 1
from sandbox.bootstrap.runner import main
main()
"""


def test_a_runner_that_never_gets_its_order_ends_and_frees_the_journal(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    order_in, order_out = os.pipe()
    runner = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, f"--lock-fd={writer.lock_fd}"], stdin=order_in, pass_fds=(writer.lock_fd,)
    )
    try:
        writer.close()
        assert journals.is_locked("task-1")
        assert runner.wait(20) == -signal.SIGALRM
        assert not journals.is_locked("task-1")
    finally:
        runner.kill()
        runner.wait()
        os.close(order_in)
        os.close(order_out)


BEGUN = (TaskSubmitted("task-1", manifest("task-1")), AttemptStarted("abcdefghijkl", "bubblewrap", "here"))
FOLLOWED = (*BEGUN, AttemptStarted("mnopqrstuvwx", "bubblewrap", "here"))
ENDED = (*BEGUN, AttemptFailed(Failure(FailureCode.INTERNAL, "It failed.")), TaskFinished())

SLOW = """
import time
import sandbox.model.limits
sandbox.model.limits.LAUNCH_SECONDS = 1
sandbox.model.limits.JOURNAL_READ_BYTES_PER_SECOND = {rate}
import sandbox.bootstrap.runner as runner
read_task = runner.replay_task
def read_slowly(*arguments):
    time.sleep(3)
    return read_task(*arguments)
runner.replay_task = read_slowly
runner.main()
"""


@pytest.mark.parametrize(
    ("bytes_per_second", "ends_as"), [(10, 1), (1024**2, -signal.SIGALRM)], ids=["a long journal", "a short one"]
)
def test_a_runner_has_time_to_read_the_journal_that_it_takes_over(tmp_path, bytes_per_second, ends_as):
    """After a reboot a hundred finishers share the machine; a long story must not cost a task its workspace."""
    journals = FileJournals(tmp_path)
    recorder = Recorder(journals.create("task-1"), None, SystemClock().now)
    for event in ENDED:
        recorder.record(event)
    order = LaunchOrder("task-1", "abcdefghijkl", str(tmp_path), str(tmp_path / "run"), "bubblewrap", finish=True)
    lock_fd = recorder.writer.lock_fd
    ran = subprocess.run(
        [sys.executable, "-c", SLOW.format(rate=bytes_per_second), f"--lock-fd={lock_fd}"],
        input=msgspec.json.encode(order), pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    assert ran.returncode == ends_as
    assert (b"StaleOrderError" in ran.stderr) is (ends_as == 1)


@pytest.mark.parametrize(
    ("events", "finish"),
    [
        ((*BEGUN, ErrorReported("a", "Somebody is at work.")), False),
        (FOLLOWED, False),
        (FOLLOWED, True),
        (ENDED, False),
        (ENDED, True),
        (BEGUN[:1], False),
    ],
    ids=[
        "begun already",
        "another attempt",
        "finisher of another",
        "over",
        "finisher of one that is over",
        "not begun",
    ],
)
def test_an_order_that_comes_late_or_twice_is_refused_and_nothing_is_written(tmp_path, events, finish):
    """Also where the lock is free to take: the order alone makes nobody an attempt's runner."""
    journals, run_dir = FileJournals(tmp_path / "data"), tmp_path / "run"
    recorder = Recorder(journals.create("task-1"), None, SystemClock().now)
    for event in events:
        recorder.record(event)
    recorder.writer.close()
    records = tmp_path / "data" / "tasks" / "task-1" / "journal" / "records"
    before, writer = records.read_bytes(), journals.open("task-1")
    order = LaunchOrder("task-1", "abcdefghijkl", str(tmp_path / "data"), str(run_dir), "bubblewrap", finish=finish)
    ran = subprocess.run(
        [sys.executable, "-I", "-m", "sandbox.bootstrap.runner", f"--lock-fd={writer.lock_fd}"],
        input=msgspec.json.encode(order),
        pass_fds=(writer.lock_fd,),
        capture_output=True,
        timeout=60,
        check=False,
    )
    writer.close()
    assert ran.returncode != 0
    assert b"StaleOrderError" in ran.stderr
    assert records.read_bytes() == before
    assert not run_dir.exists()


@pytest.mark.parametrize("order", [b"", b'{"task_id": "task-1", "attem'])
def test_a_runner_whose_server_died_while_it_gave_the_order_ends_without_alarm(tmp_path, order):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={writer.lock_fd}"],
            input=order, pass_fds=(writer.lock_fd,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=30, check=False,
        )  # fmt: skip
    finally:
        writer.close()
    (told,) = ran.stdout.decode().splitlines()
    assert "Z INFO " in told
    assert ran.returncode == 1


@pytest.mark.parametrize("finish", [True, False], ids=["finisher", "first runner"])
@pytest.mark.parametrize("obstacle", ["file", "link"])
def test_what_a_dead_runner_left_is_finished_also_where_no_socket_can_be_made(tmp_path, finish, obstacle):
    journals = FileJournals(tmp_path)
    recorder = Recorder(journals.create("task-1"), None, SystemClock().now)
    for event in BEGUN:
        recorder.record(event)
    if obstacle == "file":
        (tmp_path / "run").write_text("in the way")
    else:
        (tmp_path / "run").symlink_to(tmp_path)
    order = LaunchOrder("task-1", "abcdefghijkl", str(tmp_path), str(tmp_path / "run"), "bubblewrap", finish=finish)
    lock_fd = recorder.writer.lock_fd
    ran = subprocess.run(
        [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={lock_fd}"],
        input=msgspec.json.encode(order), pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    task = replay_task(journals, "task-1").task
    assert (ran.returncode == 0, task.state.is_terminal) == (finish, finish), ran.stderr
