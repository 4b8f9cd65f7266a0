"""What crashes leave of tasks that are over is cleared away when a server starts, and nothing of anybody else."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from doubles.live import bash, says, until
from doubles.tiers import need_runtime
from doubles.traces import cgroups, left_behind
from sandbox.contracts.recorder import Recorder, read_task
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.event import AgentExited, AttemptFailed, TaskFinished
from sandbox.model.state import TaskState
from sandbox.wiring.clock import SystemClock

LONG = "sleep 600"
STEPS = {
    "the directory": lambda files_: files_.root.exists(),
    "the disk": lambda files_: files_.disk.exists() or files_.disk_image.exists(),
    "the clone": lambda files_: files_.repository.exists(),
    "the handle": lambda files_: files_.handle.exists(),
    "the control group": lambda files_: any(files_.root.name in one for one in cgroups(files_.root.parents[3])),
    "a process": lambda files_: any(f"sandbox:{files_.root.name}" in words for words in command_lines()),
}
"""What an attempt makes, in its order; each is a moment to die in."""


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace").replace("\0", " ")


def runner_pids(data_dir):
    """All who hold the lock of a journal of this server's, the server apart."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            path, words = str(descriptor.readlink()), (descriptor.parents[1] / "cmdline").read_bytes()
            if b"sandbox.wiring.runner" in words and path.startswith(str(data_dir)) and path.endswith("/journal/lock"):
                found.add(int(descriptor.parents[1].name))
    return found


def end_books(data_dir, task_id):
    """As the server does when nobody could finish: the task is over, and what it left is there."""
    journals = FileJournals(data_dir)
    writer = until(lambda: open_or_none(journals, task_id), what="the journal's lock")
    recorder = Recorder(writer, read_task(journals, task_id).task, SystemClock().now)
    lost = Failure(FailureCode.RUNNER_LOST, "All is lost.")
    is_running = recorder.task.state is TaskState.RUNNING
    recorder.record(AgentExited(None, None, lost) if is_running else AttemptFailed(lost))
    recorder.record(TaskFinished())
    writer.close()


def open_or_none(journals, task_id):
    from sandbox.contracts.journal import JournalBusyError

    with contextlib.suppress(JournalBusyError):
        return journals.open(task_id)


def crash(machine, *task_ids):
    """Server and runners at once, and the books of these tasks are ended."""
    machine.server.stop(signal.SIGKILL)
    for pid in runner_pids(machine.data_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for task_id in task_ids:
        end_books(machine.data_dir, task_id)


def attempt_of(machine, task_id):
    from sandbox.contracts.layout import TaskLayout

    root = TaskLayout(machine.data_dir, task_id).root / "attempts"
    names = until(lambda: root.exists() and os.listdir(root), what="an attempt")
    return TaskLayout(machine.data_dir, task_id).attempt(names[0])


@pytest.mark.parametrize("runtime", ["bubblewrap", "gvisor"])
def test_whatever_was_made_when_all_died_is_gone_when_the_next_server_has_started(
    world, runtime, empty_world, tmp_path
):
    need_runtime(runtime, tmp_path / "probe")
    empty_world.runtime = runtime
    machine = world(bash(LONG), says())
    seen = set()
    for number, (what, has_come) in enumerate(STEPS.items()):
        task_id = f"task-{number}"
        machine.submit(task_id)
        attempt = attempt_of(machine, task_id)
        until(lambda attempt=attempt, has_come=has_come: has_come(attempt), what=what)
        crash(machine, task_id)
        seen |= left_behind(machine.data_dir).keys()
        machine.start_server()
        until(lambda: not left_behind(machine.data_dir), 30, f"nothing to be left of a death at {what}")
        assert machine.status(task_id)["error"]["code"] == "runner_lost"
    assert {"files", "cgroups"} <= seen or os.geteuid() != 0
