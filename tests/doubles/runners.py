"""The runners of a server's tasks, found from outside, and what they have written down."""

import contextlib
import os
from pathlib import Path


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
        return b"sandbox.bootstrap.runner" in (directory / "cmdline").read_bytes()


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
