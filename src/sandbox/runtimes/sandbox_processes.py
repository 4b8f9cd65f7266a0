"""Finds, signals, waits for, adopts and reaps the processes of sandboxes on this machine.

Processes are found through /proc. Zombies are treated as gone.
"""

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.primitives.concurrency import wait_readable_shared

_FLAGS_FIELD = 6
"""Index of a process's flags among the fields of /proc/PID/stat that follow the name."""
_PF_FORKNOEXEC = 0x40


def find_by_uid(uid: int) -> list[int]:
    """Return the living processes whose real, effective, saved or file system uid is this uid.

    One system call shows whether any process has this real uid. If no process does, no process has it as another kind
    of uid either, because a process with a reserved uid can change only to another reserved uid.
    """
    return [pid for pid in _list_pids() if uid in read_uids(pid)] if _is_real_uid_in_use(uid) else []


def find_by_marker(marker: str) -> list[int]:
    """Return the living processes that have an argument equal to `marker`."""
    wanted = os.fsencode(marker)
    return [pid for pid in _list_pids() if wanted in _read(pid, "cmdline").split(b"\0")]


def list_markers(prefix: str, is_sandbox_uid: Callable[[int], bool]) -> list[str]:
    """Return all arguments with this prefix from living processes with a sandbox uid. Processes can forge arguments."""
    known = (pid for pid in _list_pids() if any(map(is_sandbox_uid, read_uids(pid))))
    arguments = (argument for pid in known for argument in _read(pid, "cmdline").split(b"\0"))
    return sorted({os.fsdecode(one) for one in arguments if one.startswith(os.fsencode(prefix))})


def read_uids(pid: int) -> frozenset[int]:
    """Return the four uids of a living process; empty if it is gone or a zombie."""
    status = _read(pid, "status")
    if not status or status[status.index(b"\nState:\t") + 8 :][:1] in b"ZX":
        return frozenset()
    start = status.index(b"\nUid:\t") + 6
    return frozenset(map(int, status[start : status.index(b"\n", start)].split()))


def read_namespace_pid(pid: int) -> int | None:
    """Return a process's id in its innermost pid namespace."""
    status = _read(pid, "status")
    start = status.find(b"\nNSpid:\t")
    return int(status[start + 8 :].split(b"\n", 1)[0].split()[-1]) if start >= 0 else None


def find_first_command(init_pid: int) -> int | None:
    """Return the host pid of the first process that init started in its pid namespace; None unless it has called exec.

    Before the exec, the process is a copy of init. A signal before the exec would break the creation of the sandbox
    instead of reaching the command.
    """
    children = map(int, _read(init_pid, f"task/{init_pid}/children").split())
    first = next((pid for pid in children if read_namespace_pid(pid) == 2), None)
    return first if first is not None and _has_executed(first) else None


async def wait_for_exit(pidfd: int) -> bool:
    """Wait for a killed process. Return whether it ended within KILL_TIMEOUT_SECONDS."""
    try:
        async with asyncio.timeout(KILL_TIMEOUT_SECONDS):
            await wait_readable_shared(pidfd)
    except TimeoutError:
        return False
    return True


@contextmanager
def open_pidfd(pid: int) -> Iterator[int | None]:
    """Open a pidfd, which never refers to a later process with the same id. Yields None if the process is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def send_signal(pid: int, number: int, is_same_process: Callable[[int], bool]) -> None:
    """Signal a process if `is_same_process` returns True while an open pidfd prevents the reuse of its id."""
    with open_pidfd(pid) as descriptor:
        if descriptor is not None and is_same_process(pid):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)


def reap_orphans(uid: int | None) -> None:
    """Reap ended children that belonged to sandboxes: init processes of pid namespaces, and children with this uid."""
    for pid in _own_children():
        if read_namespace_pid(pid) == 1 or _is_zombie_of(pid, uid):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def reap_exec_children() -> bool:
    """Reap ended children that had joined a pid namespace. Returns False while one of them has not ended."""
    joined = [pid for pid in _own_children() if read_namespace_pid(pid) not in {None, 1, pid}]
    ended = [pid for pid in joined if not read_uids(pid)]
    for pid in ended:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return len(ended) == len(joined)


def _own_children() -> list[int]:
    tasks = os.listdir("/proc/self/task")  # noqa: PTH208
    return [int(pid) for task in tasks for pid in _read(os.getpid(), f"task/{task}/children").split()]


def _is_zombie_of(pid: int, uid: int | None) -> bool:
    status = _read(pid, "status")
    return uid is not None and b"\nState:\tZ" in status and b"\nUid:\t%d\t" % uid in status


def _is_real_uid_in_use(uid: int) -> bool:
    """Return whether a process, zombies included, has this real uid. Reading /proc would cost 50 µs per process."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _list_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)


def _has_executed(pid: int) -> bool:
    """Return whether the process has executed a program since it was forked.

    The arguments would also show this. To read them, the kernel waits for a lock (mmap_lock) that a program can hold
    for as long as the program is short of CPU time.
    """
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return len(fields) > _FLAGS_FIELD and not int(fields[_FLAGS_FIELD]) & _PF_FORKNOEXEC


def _read(pid: int, name: str) -> bytes:
    try:
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


class Subreaper:
    """Makes this process a child subreaper while at least one attempt needs it, then restores the previous state."""

    def __init__(self) -> None:
        self._attempts: set[str] = set()
        self._was_subreaper = False

    def acquire(self, attempt_id: str) -> None:
        """Adopt orphaned descendants (PR_SET_CHILD_SUBREAPER) until the attempt is released."""
        if not self._attempts:
            before = ctypes.c_int(0)
            ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
            self._was_subreaper = bool(before.value)
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._attempts.add(attempt_id)

    def release(self, attempt_id: str) -> None:
        """Stop adopting descendants for the attempt. Does nothing if the attempt was not acquired."""
        had_any = bool(self._attempts)
        self._attempts.discard(attempt_id)
        if had_any and not self._attempts and not self._was_subreaper:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
