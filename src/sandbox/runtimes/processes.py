"""Processes of this machine, as /proc tells of them. A zombie holds nothing and counts as gone."""

import asyncio
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import Runtime, SandboxHandle
from sandbox.model.errors import DECODE_ERRORS


def find_by_uid(uid: int) -> list[int]:
    """Ids of living processes that have the user id as a real, effective, saved or file system one.

    A uid that no process has as its real one is told by one system call: nothing has it as another then, because who
    runs under a uid that is set aside for sandboxes can come by no other, but by one that is set aside as well.
    """
    return [pid for pid in _list_pids() if uid in read_uids(pid)] if _is_real_uid_in_use(uid) else []


def find_by_marker(marker: str) -> list[int]:
    """Ids of living processes that have a whole argument with this text."""
    wanted = os.fsencode(marker)
    return [pid for pid in _list_pids() if wanted in _read(pid, "cmdline").split(b"\0")]


def list_markers(prefix: str, is_sandbox_uid: Callable[[int], bool]) -> list[str]:
    """Arguments that begin with `prefix`, of living processes of known uids. Whoever has a process can forge one."""
    known = (pid for pid in _list_pids() if any(map(is_sandbox_uid, read_uids(pid))))
    arguments = (argument for pid in known for argument in _read(pid, "cmdline").split(b"\0"))
    return sorted({os.fsdecode(one) for one in arguments if one.startswith(os.fsencode(prefix))})


def read_uids(pid: int) -> frozenset[int]:
    """The four user ids of a living process; empty when it is gone or a zombie."""
    status = _read(pid, "status")
    if not status or status[status.index(b"\nState:\t") + 8 :][:1] in b"ZX":
        return frozenset()
    start = status.index(b"\nUid:\t") + 6
    return frozenset(map(int, status[start : status.index(b"\n", start)].split()))


def read_namespace_pid(pid: int) -> int | None:
    """A process's id in the innermost process namespace that it is in."""
    status = _read(pid, "status")
    start = status.find(b"\nNSpid:\t")
    return int(status[start + 8 :].split(b"\n", 1)[0].split()[-1]) if start >= 0 else None


def find_first_command(init_pid: int) -> int | None:
    """The host's id of the first process that the init of a process namespace started, from its exec to its end.

    Until the exec it is a copy of init, with init's arguments: a signal then would be the end of the sandbox's making
    and not of the command.
    """
    children = map(int, _read(init_pid, f"task/{init_pid}/children").split())
    first = next((pid for pid in children if read_namespace_pid(pid) == 2), None)
    return None if first is None or _read(first, "cmdline") == _read(init_pid, "cmdline") else first


@contextmanager
def open_pidfd(pid: int) -> Iterator[int | None]:
    """A descriptor that means this very process and no later one of the same id; None when it is gone."""
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
    """Signal a process if it is still the one that was meant once it cannot be replaced any more."""
    with open_pidfd(pid) as descriptor:
        if descriptor is not None and is_same_process(pid):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)


def reap_orphans(uid: int | None) -> None:
    """Collect ended children that were sandboxes': the first of a process namespace, and those of this uid."""
    for pid in _own_children():
        if read_namespace_pid(pid) == 1 or _is_zombie_of(pid, uid):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def reap_exec_children() -> bool:
    """Collect ended children that had joined a process namespace; False while one of them has not ended."""
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
    """Whether a process has it as its real one, zombies included. Reading /proc costs 50 µs a process instead."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _list_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)


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


class SandboxLeftovers:
    """Implements `contracts.leftovers.Leftovers`.

    One runtime is enough for all of them: they are named, marked and ended in the same way.
    """

    kind = "sandbox"
    is_exclusive = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def attempt_ids(self) -> Collection[str]:
        """Those with a control group, or with a marked process."""
        return self._runtime.attempt_ids()

    async def clean_up(self, attempt_id: str, files: AttemptLayout) -> None:
        """By the handle on disk, or as far as the machine remembers. The disk is the caller's afterwards."""
        # An event loop of its own: looking at every process of the machine would hold the server's up.
        await asyncio.to_thread(lambda: asyncio.run(self._destroy(attempt_id, files)))

    async def _destroy(self, attempt_id: str, files: AttemptLayout) -> None:
        handle = _read_handle(files.handle) or self._runtime.recover(attempt_id)
        await self._runtime.destroy(handle, files.disk)


def _read_handle(path: Path) -> SandboxHandle | None:
    """None also for one that cannot be read: what it said may be found without it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except (OSError, *DECODE_ERRORS):
        return None
