"""Runners and preserved disks on this machine, as the server uses them: locks, requests, and how to kill a runner."""

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Protocol

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.journal import JournalWriter, LockState
from sandbox.interfaces.runner import Order, RunDebugSession
from sandbox.placements.local.attempt_files import LocalAttemptFiles, has_disk_or_handle
from sandbox.placements.local.runner_starters import FORK_SERVER_MODULE, RUNNER_MODULE
from sandbox.placements.runner_client import LocalRunnerClient


class JournalLocks(Protocol):
    """The journals' locks on this host; implemented by `journal/`."""

    def hand_over(self, writer: JournalWriter) -> contextlib.AbstractContextManager[int]:
        """Yield the descriptor of a writer's lock. A process that inherits it also holds the lock, and is the writer.

        Raises JournalBusyError if this writer was already handed over. A handover whose block raises OSError does not
        count.
        """
        ...

    def lock_state(self, task_id: str) -> LockState:
        """Return whether a process holds the lock now. Raises OSError."""
        ...

    def lock_path(self, task_id: str) -> Path:
        """Return the path of the lock file, which might not exist."""
        ...


class LocalRunnerHandle(LocalRunnerClient):
    """Implements `interfaces.runner.RunnerHandle` for this host."""

    def __init__(self, task_id: str, attempt_id: str, path: Path, locks: JournalLocks) -> None:
        super().__init__(path)
        self.attempt_id = attempt_id
        self._task_id = task_id
        self._locks = locks

    def lock_state(self) -> LockState:
        """Return HELD or FREE: the kernel reports who holds the lock. Implements `RunnerHandle.lock_state`."""
        return self._locks.lock_state(self._task_id)

    async def kill(self) -> bool:
        """Kill the process that holds the lock. Implements `RunnerHandle.kill`."""
        return await asyncio.to_thread(kill_lock_holder, self._locks.lock_path(self._task_id))


class LocalPreservedDisk(LocalRunnerClient):
    """Implements `interfaces.placement.PreservedDisk`: a session's runner inherits the disk's lock."""

    def __init__(
        self,
        layout: AttemptLayout,
        path: Path,
        start_runner: Callable[[Order, int], Awaitable[None]],
        files: LocalAttemptFiles,
    ) -> None:
        super().__init__(path)
        self._layout = layout
        self._start_runner = start_runner
        self._files = files
        self._lock_fd: int | None = None

    @contextlib.asynccontextmanager
    async def try_lock(self) -> AsyncIterator[LockState]:
        """Acquire the lock and yield FREE; if it is held already, yield HELD. Implements `PreservedDisk.try_lock`.

        If the preserved files are removed in the meantime, the lock file is removed as well.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock_fd = os.open(self._layout.preserved_disk_lock, flags, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            yield LockState.HELD
            return
        self._lock_fd = lock_fd
        try:
            yield LockState.FREE
        finally:
            self._lock_fd = None
            try:
                if not has_disk_or_handle(self._layout):
                    self._layout.preserved_disk_lock.unlink(missing_ok=True)
            finally:
                os.close(lock_fd)

    async def start_debug_session(self, order: RunDebugSession) -> None:
        """Start a runner that inherits the lock. Implements `PreservedDisk.start_debug_session`."""
        assert self._lock_fd is not None
        await self._start_runner(order, self._lock_fd)

    async def remove(self) -> None:
        """Remove the files. Implements `PreservedDisk.remove`."""
        assert self._lock_fd is not None
        await self._files.remove_preserved(self._layout)


_RUNNER_MODULES = frozenset({RUNNER_MODULE.encode(), FORK_SERVER_MODULE.encode(), b"sandbox.wiring.runner"})
"""Every runner has one of these arguments; other holders of a lock have none of them.

`sandbox.wiring.runner` is the former path of the module: runners that version 0.1 started continue during an upgrade.
"""


def kill_lock_holder(lock: Path) -> bool:
    """Send SIGKILL to each runner, except this process, that holds this file's lock. Return whether one was killed."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    killed = [pid for pid in pids if pid != os.getpid() and _kill_if_holding(pid, found)]
    return bool(killed)


def _kill_if_holding(pid: int, lock: os.stat_result) -> bool:
    if not _holds_lock(pid, lock):
        return False
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # Check again: the pidfd now rules out a later process with the same id.
            if _holds_lock(pid, lock):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _holds_lock(pid: int, lock: os.stat_result) -> bool:
    proc_dir = Path("/proc", str(pid))
    try:
        if _RUNNER_MODULES.isdisjoint((proc_dir / "cmdline").read_bytes().split(b"\0")):
            return False
        descriptors = os.listdir(proc_dir / "fdinfo")  # noqa: PTH208
    except OSError:
        return False
    return any(_descriptor_holds_lock(proc_dir, descriptor, lock) for descriptor in descriptors)


def _descriptor_holds_lock(proc_directory: Path, descriptor: str, lock: os.stat_result) -> bool:
    """Check the descriptor itself, not only its fdinfo.

    On overlayfs and btrfs, fdinfo shows the device number of the file system, which differs from the `st_dev` of its
    files. Only the fdinfo of the lock's own file is read: a sandbox process can have the command-line argument of a
    runner, and can open files with 100 MB of fdinfo each. A descriptor that is closed during the check does not count.
    """
    try:
        if not os.path.samestat((proc_directory / "fd" / descriptor).stat(), lock):
            return False
        # proc(5): one line for each lock of the descriptor.
        lines = (proc_directory / "fdinfo" / descriptor).read_text().splitlines()
        return any(line.startswith("lock:") and " FLOCK " in line and " WRITE " in line for line in lines)
    except OSError:
        return False
