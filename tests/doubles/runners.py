"""The runners of a server's tasks, found from outside, and what they have written down."""

import contextlib
import os
from pathlib import Path

from doubles.live_server import until
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import JournalBusyError, Recorder, replay_task
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, AttemptFailed, TaskFinished
from sandbox.model.task_state import TaskState

_RUNNER_MODULES = (b"sandbox.bootstrap.runner", b"sandbox.wiring.runner")
"""The second is of version 0.1."""


def runner_pid(machine, task_id="task-1"):
    """As `runner_of`."""
    return runner_of(machine.data_dir, task_id)


def runner_of(data_dir, task_id):
    """The process that holds the journal's lock: its order of start names no task, its open files do. None without."""
    try:
        lock = (data_dir / "tasks" / task_id / "journal" / "lock").stat()
    except FileNotFoundError:
        return None
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and _is_runner(directory) and any(_has_open(directory, lock)):
            return int(directory.name)
    return None


def _is_runner(directory):
    with contextlib.suppress(OSError):
        command_line = (directory / "cmdline").read_bytes()
        return any(module in command_line for module in _RUNNER_MODULES)
    return False


def _has_open(directory, file):
    with contextlib.suppress(OSError):
        for descriptor in (directory / "fd").iterdir():
            # One that is closed meanwhile says nothing of the others.
            with contextlib.suppress(OSError):
                yield os.path.samestat(descriptor.stat(), file)


def records(machine, task_id="task-1"):
    """The journal as text."""
    return (machine.data_dir / "tasks" / task_id / "journal" / "records").read_text(errors="replace")


def first_process(machine, task_id="task-1"):
    """Of the sandbox of the task's present attempt: the oldest one that carries its mark."""
    mark = f"sandbox:{machine.status(task_id)['attempts'][-1]['id']}\0".encode()
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if mark in (directory / "cmdline").read_bytes():
                began = int((directory / "stat").read_text().rpartition(")")[2].split()[19])
                found.append((began, int(directory.name)))
    return min(found)[1]


def end_books(data_dir, task_id):
    """As the server does when nobody could finish: the task is over, and what it left is there."""
    journals = FileJournals(data_dir)
    writer = until(lambda: _open_or_none(journals, task_id), what="the journal's lock")
    recorder = Recorder(writer, replay_task(journals, task_id).task, SystemClock().now)
    lost = Failure(FailureCode.RUNNER_LOST, "All is lost.")
    is_running = recorder.task.state is TaskState.RUNNING
    recorder.record(AgentExited(None, None, lost) if is_running else AttemptFailed(lost))
    recorder.record(TaskFinished())
    writer.close()


def _open_or_none(journals, task_id):
    with contextlib.suppress(JournalBusyError):
        return journals.open(task_id)
