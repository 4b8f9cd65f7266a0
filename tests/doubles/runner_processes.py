"""Finds the runners of a server's tasks on the host, and reads and finalizes their journals."""

import contextlib
import os
from pathlib import Path

from doubles.deployment import wait_until
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import JournalBusyError
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model.events import AgentExited, AttemptFailed, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState

_RUNNER_MODULES = (b"sandbox.bootstrap.runner", b"sandbox.wiring.runner")
"""The current name of the runner's module, and its name in version 0.1."""


def runner_pid(deployment, task_id="task-1"):
    return find_runner(deployment.data_dir, task_id)


def find_runner(data_dir, task_id):
    """Return the pid of the runner that has the journal's lock file open; None if there is none."""
    return next(_list_runners(data_dir, task_id), None)


def find_runners(data_dir, task_id):
    """Return the pids of all runners that have the journal's lock file open."""
    return list(set(_list_runners(data_dir, task_id)))


def _list_runners(data_dir, task_id):
    try:
        lock = (data_dir / "tasks" / task_id / "journal" / "lock").stat()
    except FileNotFoundError:
        return
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and _is_holder(directory, lock):
            # A child of a runner looks like the runner until the child executes its program.
            parent = _parent(directory)
            yield int(parent.name if _is_holder(parent, lock) else directory.name)


def _is_holder(directory, lock):
    return _is_runner(directory) and any(_has_open(directory, lock))


def _parent(directory):
    with contextlib.suppress(OSError):
        return Path("/proc", (directory / "stat").read_text().rpartition(")")[2].split()[1])
    return directory


def _is_runner(directory):
    with contextlib.suppress(OSError):
        command_line = (directory / "cmdline").read_bytes()
        return any(module in command_line for module in _RUNNER_MODULES)
    return False


def _has_open(directory, file):
    with contextlib.suppress(OSError):
        for descriptor in (directory / "fd").iterdir():
            # A descriptor that was closed in the meantime does not affect the others.
            with contextlib.suppress(OSError):
                yield os.path.samestat(descriptor.stat(), file)


def read_journal(deployment, task_id="task-1"):
    """Return the task's journal as text."""
    return (deployment.data_dir / "tasks" / task_id / "journal" / "records").read_text(errors="replace")


def first_process(deployment, task_id="task-1"):
    """Return the pid of the oldest process marked with the task's current attempt."""
    attempt_marker = f"sandbox:{deployment.status(task_id)['attempts'][-1]['id']}\0".encode()
    candidates = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if attempt_marker in (directory / "cmdline").read_bytes():
                started = int((directory / "stat").read_text().rpartition(")")[2].split()[19])
                candidates.append((started, int(directory.name)))
    return min(candidates)[1]


def finalize_journal(data_dir, task_id):
    """Finalize the journal as a server does after a runner has failed; leftovers remain."""
    journals = FileJournals(data_dir)
    writer = wait_until(lambda: _open_or_none(journals, task_id), description="the journal's lock")
    recorder = JournalRecorder(writer, journals.replay(task_id).task, SystemClock().now)
    failure = Failure(FailureCode.RUNNER_LOST, "The runner is lost.")
    is_running = recorder.task.state is TaskState.RUNNING
    recorder.record(AgentExited(None, None, failure) if is_running else AttemptFailed(failure))
    recorder.record(TaskFinished())
    writer.close()


def _open_or_none(journals, task_id):
    with contextlib.suppress(JournalBusyError):
        return journals.open(task_id)
