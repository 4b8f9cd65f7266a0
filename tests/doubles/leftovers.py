"""Finds leftovers of one server's tasks: processes, mounts, cgroups, loop devices, sockets, files.

Leftovers are matched by attempt id and data directory, since other tests run concurrently. Namespaces are covered by
the processes and mounts that keep them alive.
"""

import contextlib
import re
import subprocess
from pathlib import Path

SANDBOX_UIDS = range(1_900_000_000, 1_900_065_000)
SANDBOX_PID_MAX = 5000


@contextlib.contextmanager
def host_process():
    """Yield a host process whose pid is not used inside sandboxes, where pids start at 1."""
    while (child := subprocess.Popen(["sleep", "3600"])).pid < SANDBOX_PID_MAX:
        child.kill()
        child.wait()
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def attempt_ids(data_dir):
    """Return the ids of all attempts in the data directory, including ended ones, whose runner logs are kept."""
    return {path.name for path in Path(data_dir).glob("tasks/*/attempts/*")}


def processes(data_dir):
    """Return the processes of all attempts, without the server.

    They are in an attempt's cgroup, or have an attempt's id or the data directory in an argument.
    """
    ids = attempt_ids(data_dir)
    pattern = re.compile("|".join([re.escape(str(data_dir)), *(f"sandbox[:/]{one}" for one in ids)]))
    found = set()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            command_line = (directory / "cmdline").read_bytes().decode(errors="replace")
            if (pattern.search(command_line) and "\0serve\0" not in command_line) or pattern.search(
                (directory / "cgroup").read_text()
            ):
                found.add((int(directory.name), command_line.replace("\0", " ")[:80]))
        except OSError:
            continue
    return found


def mounts(data_dir):
    """Return the mounts in this namespace whose entries contain the data directory or an attempt id."""
    names = {str(data_dir), *attempt_ids(data_dir)}
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if any(name in line for name in names)}


def cgroups(data_dir):
    """Return the control groups that belong to attempts, from all hierarchies."""
    root = Path("/sys/fs/cgroup")
    parents = (*root.glob("*/sandbox*"), *root.glob("sandbox*"), *root.glob("*/*/sandbox*"))
    ids = attempt_ids(data_dir)
    return {str(path) for parent in parents for path in parent.glob("*") if path.is_dir() and path.name in ids}


def loop_devices(data_dir):
    """Return the files in the data directory that back loop devices."""
    found = set()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(backing.read_text().strip())
        except OSError:
            continue
    return {path for path in found if path.startswith(str(Path(data_dir).resolve()))}


def sockets(data_dir):
    """Return the sockets of runners."""
    ids = attempt_ids(data_dir)
    return {str(path) for path in Path("/run/sandbox").glob("*/*.sock") if path.stem in ids}


def files(data_dir):
    """Return the files of attempts, except runner logs without warnings."""
    return {
        str(path)
        for path in Path(data_dir).glob("tasks/*/attempts/*/*")
        if path.name != "runner.log" or has_warnings(path)
    }


def has_warnings(log):
    """Return whether the log has a line with a level above INFO."""
    return any("Z INFO " not in line for line in log.read_text().splitlines())


_KINDS = (processes, mounts, cgroups, loop_devices, sockets, files)


def find_leftovers(data_dir):
    """Return the leftovers, keyed by kind; empty if there are none."""
    return {kind.__name__: found for kind in _KINDS if (found := kind(data_dir))}


def is_clean(data_dir):
    """Return whether there are no leftovers. Suitable for polling, since processes are checked last."""
    return not any(kind(data_dir) for kind in reversed(_KINDS))
