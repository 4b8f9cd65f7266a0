"""Finds what can be killed of a task, from outside, and stops, steps and kills it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

STEP_SECONDS = 0.002


def members_of(attempt_id):
    """Processes of the sandbox, the oldest first."""
    root = Path("/sys/fs/cgroup")
    groups = (*root.glob(f"*/sandbox*/{attempt_id}"), *root.glob(f"sandbox*/{attempt_id}"))
    pids = set()
    for group in groups:
        with contextlib.suppress(OSError):
            pids |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    return sorted((pid for pid in pids if _began_at(pid)), key=_began_at)


def init_of(attempt_id):
    """The process with number 1 inside, as the host numbers it; None where the kernel inside is another one."""
    for pid in members_of(attempt_id):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
    return None


def destroy_sockets(pid):
    """Have the kernel close every socket in the network namespace of `pid` that belongs to its gateway.

    True when it could: ss(8) has --kill, and the kernel must be built with INET_DIAG_DESTROY.
    """
    ran = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "ss", "--kill", "--all", "--tcp", "--udp", "--no-header"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    return ran.returncode == 0 and bool(ran.stdout.strip())


def can_destroy_sockets():
    """Tried on a socket of our own."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        place = ("sport", "=", f":{own.getsockname()[1]}")
        ran = subprocess.run(
            ["ss", "--kill", "--listening", "--tcp", "--no-header", *place],
            capture_output=True,
            timeout=30,
            check=False,
        )
    return ran.returncode == 0 and bool(ran.stdout.strip())


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def go_on(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def stop(pid):
    """Wait until it really stands still; False when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    while (letter := _letter(pid)) not in ("T", "", "Z", "X"):
        time.sleep(0.0005)
    return letter == "T"


def step(pid):
    """Let a stopped process run for an instant; False when it is gone."""
    go_on(pid)
    time.sleep(STEP_SECONDS)
    return stop(pid)


def _stat(pid):
    """The fields of proc(5) after the name; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _letter(pid):
    return next(iter(_stat(pid)), "")


def _began_at(pid):
    fields = _stat(pid)
    return int(fields[19]) if fields else 0
