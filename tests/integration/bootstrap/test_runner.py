"""The runner process, from its start until it owns the journal."""

import contextlib
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from doubles.manifests import manifest
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model.events import AttemptFailed, AttemptStarted, ErrorReported, TaskFinished, TaskSubmitted
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import AgentSection
from sandbox.model.task_state import TaskState
from sandbox.placements.local.runner_starters import LaunchMessage, RunnerSettings

SHORT_LAUNCH_TIMEOUT_PROGRAM = """
import sandbox.model.fixed_limits
sandbox.model.fixed_limits.LAUNCH_TIMEOUT_SECONDS = 1
from sandbox.bootstrap.runner import main
main()
"""


def test_runner_without_an_order_exits_and_releases_the_journal(tmp_path):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    order_read_fd, order_write_fd = os.pipe()
    runner = subprocess.Popen(
        [sys.executable, "-c", SHORT_LAUNCH_TIMEOUT_PROGRAM, f"--lock-fd={writer.lock_fd}"],
        stdin=order_read_fd,
        pass_fds=(writer.lock_fd,),
    )
    try:
        writer.close()
        assert journals.lock_state("task-1") is LockState.HELD
        assert runner.wait(20) == -signal.SIGALRM
        assert journals.lock_state("task-1") is LockState.FREE
    finally:
        runner.kill()
        runner.wait()
        os.close(order_read_fd)
        os.close(order_write_fd)


def test_runner_rejects_an_option_of_another_version():
    """Ignoring it could leave a runner without its parent, for example."""
    command = [sys.executable, "-m", "sandbox.bootstrap.runner", "--lock-fd=0", "--other-fd=1"]
    runner = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert runner.returncode == 1
    assert "unknown option --other-fd" in runner.stderr


WITH_PARENT_PIPE_PROGRAM = """
import os, sys, time
from sandbox.bootstrap.runner import die_with_parent_pipe
die_with_parent_pipe(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent_pipe():
    """Both ends of a pipe."""
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def start_with_parent_pipe(reading):
    return subprocess.Popen(
        [sys.executable, "-c", WITH_PARENT_PIPE_PROGRAM, str(reading)], stdout=subprocess.PIPE, pass_fds=(reading,)
    )


@pytest.mark.parametrize("is_stopped", [False, True])
def test_runners_are_killed_when_the_writer_of_their_pipe_ends(parent_pipe, is_stopped):
    reading, writing = parent_pipe
    runners = [start_with_parent_pipe(reading) for _ in range(2)]
    try:
        assert [runner.stdout.readline() for runner in runners] == [b"ready\n"] * 2
        if is_stopped:
            for runner in runners:
                runner.send_signal(signal.SIGSTOP)
        assert [runner.poll() for runner in runners] == [None, None]
        os.close(writing)
        assert [runner.wait(20) for runner in runners] == [-signal.SIGKILL] * 2
    finally:
        for runner in runners:
            runner.kill()
            runner.communicate()


def test_runner_does_not_start_if_the_writer_of_its_pipe_has_ended(parent_pipe):
    reading, writing = parent_pipe
    os.close(writing)
    with start_with_parent_pipe(reading) as runner:
        assert runner.wait(20) == -signal.SIGKILL
        assert runner.stdout.read() == b""


STARTED = (TaskSubmitted("task-1", manifest("task-1")), AttemptStarted("abcdefghijkl", "bubblewrap", "here"))
NEWER_ATTEMPT = (*STARTED, AttemptStarted("mnopqrstuvwx", "bubblewrap", "here"))
ENDED = (*STARTED, AttemptFailed(Failure(FailureCode.INTERNAL, "It failed.")), TaskFinished())

ORDERS = {False: RunAttempt("task-1", "abcdefghijkl"), True: FinishAttempt("task-1", "abcdefghijkl")}
"""The orders of a first runner and of a finisher."""


def launch_message(order, data_dir, run_dir):
    return msgspec.json.encode(LaunchMessage(order, RunnerSettings(str(data_dir), str(run_dir), "bubblewrap")))


SLOW_JOURNAL_PROGRAM = """
import time
import sandbox.model.fixed_limits
sandbox.model.fixed_limits.LAUNCH_TIMEOUT_SECONDS = 1
sandbox.model.fixed_limits.JOURNAL_READ_BYTES_PER_SECOND_MIN = {rate}
from sandbox.bootstrap.runner import main
from sandbox.journal.journals import FileJournals
replay = FileJournals.replay
def replay_slowly(*arguments):
    time.sleep(3)
    return replay(*arguments)
FileJournals.replay = replay_slowly
main()
"""


@pytest.mark.parametrize(
    ("bytes_per_second", "exit_code"), [(10, 1), (1024**2, -signal.SIGALRM)], ids=["long journal", "short journal"]
)
def test_launch_timeout_grows_with_the_size_of_the_journal(tmp_path, bytes_per_second, exit_code):
    """After a reboot, many finishers run at once. A timeout during a long journal read would lose the workspace."""
    journals = FileJournals(tmp_path)
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    for event in ENDED:
        recorder.record(event)
    message = launch_message(FinishAttempt("task-1", "abcdefghijkl"), tmp_path, tmp_path / "run")
    lock_fd = recorder.writer.lock_fd
    result = subprocess.run(
        [sys.executable, "-c", SLOW_JOURNAL_PROGRAM.format(rate=bytes_per_second), f"--lock-fd={lock_fd}"],
        input=message, pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    assert result.returncode == exit_code
    assert (b"StaleOrderError" in result.stderr) is (exit_code == 1)


@pytest.mark.parametrize(
    ("events", "finish"),
    [
        ((*STARTED, ErrorReported("a", "Reported by the running attempt.")), False),
        (NEWER_ATTEMPT, False),
        (NEWER_ATTEMPT, True),
        (ENDED, False),
        (ENDED, True),
        (STARTED[:1], False),
    ],
    ids=[
        "already started",
        "newer attempt",
        "finisher, newer attempt",
        "task ended",
        "finisher, task ended",
        "not started",
    ],
)
def test_stale_or_duplicate_order_is_rejected_without_writes(tmp_path, events, finish):
    """A free lock is not sufficient. The order must also match the journal."""
    journals, run_dir = FileJournals(tmp_path / "data"), tmp_path / "run"
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    for event in events:
        recorder.record(event)
    recorder.writer.close()
    records = tmp_path / "data" / "tasks" / "task-1" / "journal" / "records"
    before, writer = records.read_bytes(), journals.open("task-1")
    message = launch_message(ORDERS[finish], tmp_path / "data", run_dir)
    result = subprocess.run(
        [sys.executable, "-I", "-m", "sandbox.bootstrap.runner", f"--lock-fd={writer.lock_fd}"],
        input=message,
        pass_fds=(writer.lock_fd,),
        capture_output=True,
        timeout=60,
        check=False,
    )
    writer.close()
    assert result.returncode != 0
    assert b"StaleOrderError" in result.stderr
    assert records.read_bytes() == before
    assert not run_dir.exists()


@pytest.mark.parametrize("order", [b"", b'{"task_id": "task-1", "attem'])
def test_truncated_order_exits_with_an_info_message(tmp_path, order):
    journals = FileJournals(tmp_path)
    writer = journals.create("task-1")
    try:
        result = subprocess.run(
            [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={writer.lock_fd}"],
            input=order, pass_fds=(writer.lock_fd,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=30, check=False,
        )  # fmt: skip
    finally:
        writer.close()
    (line,) = result.stdout.decode().splitlines()
    assert "Z INFO " in line
    assert result.returncode == 1


@pytest.mark.parametrize("finish", [True, False], ids=["finisher", "first runner"])
@pytest.mark.parametrize("run_dir_kind", ["file", "link"])
def test_finisher_completes_without_a_control_socket(tmp_path, finish, run_dir_kind):
    journals = FileJournals(tmp_path)
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    for event in STARTED:
        recorder.record(event)
    if run_dir_kind == "file":
        (tmp_path / "run").write_text("in the way")
    else:
        (tmp_path / "run").symlink_to(tmp_path)
    message = launch_message(ORDERS[finish], tmp_path, tmp_path / "run")
    lock_fd = recorder.writer.lock_fd
    result = subprocess.run(
        [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={lock_fd}"],
        input=message, pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    task = journals.replay("task-1").task
    assert (result.returncode == 0, task.state.is_final) == (finish, finish), result.stderr


def test_finisher_accepts_the_message_from_an_earlier_version(tmp_path):
    """An earlier server version starts this runner if the installation is upgraded while that server is running."""
    journals = FileJournals(tmp_path)
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    for event in STARTED:
        recorder.record(event)
    message = (
        b'{"task_id":"task-1","attempt_id":"abcdefghijkl","data_dir":"%s","run_dir":"%s/run","runtime":"bubblewrap",'
        b'"finish":true}' % (bytes(tmp_path), bytes(tmp_path))
    )
    lock_fd = recorder.writer.lock_fd
    result = subprocess.run(
        [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={lock_fd}"],
        input=message, pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    assert result.returncode == 0, result.stderr
    assert journals.replay("task-1").task.failure.code is FailureCode.RUNNER_LOST


def test_finisher_needs_no_agent(tmp_path):
    """A later version may no longer include the agent of a task whose runner died."""
    journals = FileJournals(tmp_path)
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    section = AgentSection("retired", {"prompt": "Do it.", "model": "m"})
    for event in (TaskSubmitted("task-1", manifest("task-1").replace(agent=section)), *STARTED[1:]):
        recorder.record(event)
    lock_fd = recorder.writer.lock_fd
    result = subprocess.run(
        [sys.executable, "-m", "sandbox.bootstrap.runner", f"--lock-fd={lock_fd}"],
        input=launch_message(ORDERS[True], tmp_path, tmp_path / "run"),
        pass_fds=(lock_fd,), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    recorder.writer.close()
    task = journals.replay("task-1").task
    assert (result.returncode, task.state, task.failure.code) == (0, TaskState.FAILED, FailureCode.RUNNER_LOST), result
