"""The supervisor of one job: a detached process that runs the worker once, and then ends all of the job's processes.

Run as `python -I -m sandbox.cluster_engines.processes.supervisor DIRECTORY`; `engine.py` describes the directory's
files. The supervisor holds the lock on the file `lock`, and the worker inherits the lock. The lock is free only after
both have ended. The supervisor imports few modules, because one runs for each job.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox.primitives.files import write_durably

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
_KILL_POLL_SECONDS = 0.02
_KILL_REPEAT_SECONDS = 5.0


def read_start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc(5), stat); None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def read_boot_id() -> str:
    """Return the id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main(directory: Path) -> int:
    """Start the supervisor and wait for its start. Do nothing if the job is running, was started or was cancelled."""
    lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    if any((directory / name).exists() for name in ("started.json", "withdrawn")):
        return 0
    request = json.loads((directory / "request.json").read_bytes())["request"]
    with suppress(FileNotFoundError):  # without its token, the worker ends, and the server submits another job
        request["environment"] = json.loads((directory / "environment").read_bytes())
    started_read_fd, started_write_fd = os.pipe()
    if os.fork() != 0:
        os.close(started_write_fd)
        return 0 if os.read(started_read_fd, 1) else 1
    os.close(started_read_fd)
    os.setsid()
    _Supervisor(directory, request, lock_fd).run(started_write_fd)
    return 0


class _Supervisor:
    def __init__(self, directory: Path, request: Mapping[str, Any], lock_fd: int) -> None:
        self._directory = directory
        self._request = request
        self._lock_fd = lock_fd
        self._libc = ctypes.CDLL(None, use_errno=True)

    def run(self, started_write_fd: int) -> None:
        """Record the start, run the worker until it ends, kill what it left behind, and record how it ended."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        own = {"pid": os.getpid(), "start_time": read_start_time(os.getpid()), "boot_id": read_boot_id()}
        write_durably(self._directory / "started.json", json.dumps(own).encode())
        with suppress(FileNotFoundError):
            (self._directory / "environment").unlink()  # it contains the join token
        os.write(started_write_fd, b"1")
        os.close(started_write_fd)
        # Processes that the worker leaves behind become children of this process.
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        supervisor, worker = os.getpid(), os.fork()
        if worker == 0:
            self._become_worker(supervisor)
        wait_status = self._supervise(worker)
        _kill_children()
        ended = {"exit_code": os.waitstatus_to_exitcode(wait_status)}
        with suppress(OSError):  # on a full disk, only the free lock shows that the job has ended
            write_durably(self._directory / "ended.json", json.dumps(ended).encode())

    def _become_worker(self, supervisor: int) -> None:
        """Execute the worker; exit with 127 if that fails. The worker dies with the supervisor."""
        try:
            os.setsid()
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(127)
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDONLY)
            output = os.open(self._request["output_file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            for source, target in ((null, 0), (output, 1), (output, 2)):
                os.dup2(source, target)
            os.set_inheritable(self._lock_fd, True)
            command = self._request["command"]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.execve(command[0], command, self._request["environment"])  # noqa: S606  (as intended)
        except OSError as error:
            with suppress(OSError):
                os.write(2, f"the worker cannot be started: {error}\n".encode())
        finally:
            os._exit(127)

    def _supervise(self, worker: int) -> int:
        """Wait for the worker to end; return its wait status. Sends SIGTERM to it at the time limit or on a signal."""
        grace_seconds = float(self._request["grace_seconds"])
        deadline = time.monotonic() + float(self._request["time_limit_seconds"])
        number = signal.SIGTERM
        while True:
            received = signal.sigtimedwait(_SIGNALS, max(0.0, deadline - time.monotonic()))
            if received is not None and received.si_signo == signal.SIGCHLD:
                wait_status = _reap(worker)
                if wait_status is not None:
                    return wait_status
                continue
            if received is not None and number == signal.SIGKILL:
                continue  # another signal during the grace period
            os.kill(worker, number)
            os.kill(worker, signal.SIGCONT)
            deadline = time.monotonic() + (grace_seconds if number == signal.SIGTERM else _KILL_REPEAT_SECONDS)
            number = signal.SIGKILL


def _reap(worker: int) -> int | None:
    """Reap all ended children. Return the worker's wait status if the worker is among them."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == worker:
                found = wait_status
    return found


def _kill_children() -> None:
    """Kill the job's remaining processes until none is left. Their children become children of this process."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in map(int, children):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_KILL_POLL_SECONDS)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
