"""What the tasks of one server could leave on the machine: processes, mounts, cgroups, loop devices, sockets, files.

Only what is those tasks' own, by their attempt ids and their data directory, since other tests run beside. A namespace
lives as long as a process, a mount or a descriptor of it, and those are looked at.
"""

import contextlib
import re
import subprocess
from pathlib import Path

SANDBOX_UIDS = range(1_900_000_000, 1_900_065_000)
NUMBERS_INSIDE_MAX = 5000


@contextlib.contextmanager
def process_outside():
    """A process of the host's with a number that is no process's inside: there they begin anew."""
    while (child := subprocess.Popen(["sleep", "3600"])).pid < NUMBERS_INSIDE_MAX:
        child.kill()
        child.wait()
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def attempt_ids(data_dir):
    """Of all attempts that were ever begun there; their runners' logs stay."""
    return {path.name for path in Path(data_dir).glob("tasks/*/attempts/*")}


def processes(data_dir):
    """Of an attempt's control group, marked with its id, or told of the data directory, the server apart."""
    ids = attempt_ids(data_dir)
    own = re.compile("|".join([re.escape(str(data_dir)), *(f"sandbox[:/]{one}" for one in ids)]))
    found = set()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            words = (directory / "cmdline").read_bytes().decode(errors="replace")
            if (own.search(words) and "\0serve\0" not in words) or own.search((directory / "cgroup").read_text()):
                found.add((int(directory.name), words.replace("\0", " ")[:80]))
        except OSError:
            continue
    return found


def mounts(data_dir):
    """Mount points of this namespace that name the data directory or an attempt."""
    names = {str(data_dir), *attempt_ids(data_dir)}
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if any(name in line for name in names)}


def cgroups(data_dir):
    """Directories of attempts in any cgroup hierarchy."""
    root = Path("/sys/fs/cgroup")
    parents = (*root.glob("*/sandbox*"), *root.glob("sandbox*"), *root.glob("*/*/sandbox*"))
    ids = attempt_ids(data_dir)
    return {str(path) for parent in parents for path in parent.glob("*") if path.is_dir() and path.name in ids}


def loop_devices(data_dir):
    """Files below the data directory that loop devices stand for."""
    found = set()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(backing.read_text().strip())
        except OSError:
            continue
    return {path for path in found if path.startswith(str(Path(data_dir).resolve()))}


def sockets(data_dir):
    """Of runners."""
    ids = attempt_ids(data_dir)
    return {str(path) for path in Path("/run/sandbox").glob("*/*.sock") if path.stem in ids}


def files(data_dir):
    """What is left of attempts, but for runner logs that tell of nothing unusual."""
    return {
        str(path)
        for path in Path(data_dir).glob("tasks/*/attempts/*/*")
        if path.name != "runner.log" or has_trouble(path)
    }


def has_trouble(log):
    """A line that is no plain piece of information."""
    return any("Z INFO " not in line for line in log.read_text().splitlines())


_KINDS = (processes, mounts, cgroups, loop_devices, sockets, files)


def left_behind(data_dir):
    """What is there, by kind; empty when nothing is."""
    return {kind.__name__: found for kind in _KINDS if (found := kind(data_dir))}


def is_clean(data_dir):
    """Whether nothing is; for those who ask again and again, as it looks through all processes last."""
    return not any(kind(data_dir) for kind in reversed(_KINDS))
