"""Finds, stops, briefly resumes and kills a task's processes from the host."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

TIME_SLICE_SECONDS = 0.002


def members_of(attempt_id):
    """Return the processes of the sandbox, oldest first."""
    root = Path("/sys/fs/cgroup")
    groups = (*root.glob(f"*/sandbox*/{attempt_id}"), *root.glob(f"sandbox*/{attempt_id}"))
    pids = set()
    for group in groups:
        with contextlib.suppress(OSError):
            pids |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    return sorted((pid for pid in pids if _start_time(pid)), key=_start_time)


def init_of(attempt_id):
    """Return the host pid of the sandbox's pid 1; None if the sandbox has its own kernel."""
    for pid in members_of(attempt_id):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
    return None


def destroy_sockets(pid):
    """Close all sockets of the gateway in the network namespace of `pid`.

    Return whether that worked. Requires ss(8) with --kill, and a kernel with INET_DIAG_DESTROY.
    """
    result = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "ss", "--kill", "--all", "--tcp", "--udp", "--no-header"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    return result.returncode == 0 and bool(result.stdout.strip())


def can_destroy_sockets():
    """Try to destroy a socket of this process; return whether that worked."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        filter_expression = ("sport", "=", f":{own.getsockname()[1]}")
        result = subprocess.run(
            ["ss", "--kill", "--listening", "--tcp", "--no-header", *filter_expression],
            capture_output=True,
            timeout=30,
            check=False,
        )
    return result.returncode == 0 and bool(result.stdout.strip())


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def resume(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def stop(pid):
    """Stop the process and wait until it is stopped; return False if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    while (letter := _state_letter(pid)) not in ("T", "", "Z", "X"):
        time.sleep(0.0005)
    return letter == "T"


def descendants_of(pid):
    """Return the pid and those of all its descendants. The first process of a PID namespace adopts orphans."""
    parents = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and (fields := _stat(directory.name)):
            parents.setdefault(int(fields[1]), []).append(int(directory.name))
    found = [pid]
    for one in found:
        found += parents.get(one, ())
    return found


def stop_all(pid):
    """Stop the process and all its descendants, as if their host were suspended; return their pids."""
    stopped = set()
    while new := set(descendants_of(pid)) - stopped:
        for one in new:
            stop(one)
        stopped |= new
    return stopped


def run_briefly(pid):
    """Let a stopped process run for an instant; return False if it has ended."""
    resume(pid)
    time.sleep(TIME_SLICE_SECONDS)
    return stop(pid)


def _stat(pid):
    """Return the fields of /proc/PID/stat after the name; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _state_letter(pid):
    return next(iter(_stat(pid)), "")


def _start_time(pid):
    fields = _stat(pid)
    return int(fields[19]) if fields else 0
