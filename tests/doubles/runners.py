"""The runners of a server's tasks, found from outside, and what they have written down."""

import contextlib
from pathlib import Path


def runner_pid(machine, task_id="task-1"):
    """The process that holds the journal's lock: its order of start names no task, its open files do."""
    lock = (machine.data_dir / "tasks" / task_id / "journal" / "lock").stat()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            if b"sandbox.wiring.runner" not in (directory / "cmdline").read_bytes():
                continue
            opened = [fd.stat() for fd in (directory / "fd").iterdir() if fd.exists()]
        except OSError:
            continue
        if any((each.st_dev, each.st_ino) == (lock.st_dev, lock.st_ino) for each in opened):
            return int(directory.name)
    return None


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
