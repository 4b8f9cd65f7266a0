"""What a sandbox could leave on the machine: processes, mounts, namespaces, cgroups, loop devices, sockets, files."""

from pathlib import Path

SANDBOX_UIDS = range(1_900_000_000, 1_900_065_000)


def sandbox_processes():
    """Processes of sandbox users, and whatever carries bubblewrap or Claude Code in its name, as (pid, name)."""
    found = set()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            name = (directory / "comm").read_text().strip()
            uid = directory.stat().st_uid
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if uid in SANDBOX_UIDS or name in {"bwrap", "claude"} or (state == "Z" and name.startswith("python")):
            found.add((int(directory.name), f"{name} {state}"))
    return found


def namespaces():
    """The network and mount namespaces that processes live in."""
    found = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            for kind in ("net", "mnt"):
                try:
                    found.add((directory / "ns" / kind).readlink().name)
                except OSError:
                    continue
    return found


def mounts():
    """This namespace's mount points."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def cgroups():
    """Directories of sandboxes in any cgroup hierarchy."""
    root = Path("/sys/fs/cgroup")
    return {
        str(path)
        for parent in (*root.glob("*/sandbox*"), *root.glob("sandbox*"), *root.glob("*/*/sandbox*"))
        for path in parent.glob("*")
        if path.is_dir()
    }


def loop_devices():
    """Files that loop devices stand for."""
    found = set()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(backing.read_text().strip())
        except OSError:
            continue
    return found


def sockets():
    """Of runners, wherever their servers run."""
    return {str(path) for path in Path("/run/sandbox").glob("*/*.sock")}


def files(data_dir):
    """What is left of attempts in a data directory, but for runner logs that tell of nothing unusual."""
    return {
        str(path)
        for path in Path(data_dir).glob("tasks/*/attempts/*/*")
        if path.name != "runner.log" or has_trouble(path)
    }


def has_trouble(log):
    """A line that is no plain piece of information."""
    return any("Z INFO " not in line for line in log.read_text().splitlines())


def traces(data_dir):
    """All of it."""
    return {
        "processes": sandbox_processes(),
        "mounts": mounts(),
        "namespaces": namespaces(),
        "cgroups": cgroups(),
        "loop devices": loop_devices(),
        "sockets": sockets(),
        "files": files(data_dir),
    }


def leaked(before, data_dir):
    """What is there now and was not before, by kind; empty when nothing is."""
    now = traces(data_dir)
    return {kind: now[kind] - before[kind] for kind in now if now[kind] - before[kind]}
