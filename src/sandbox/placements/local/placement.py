"""Runs attempts on this machine: starts runners as processes that outlive the server, and measures the machine's load.

Handles give access to runners and preserved disks: they check locks, send requests and kill runners.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.interfaces.journal import JournalWriter, LockState
from sandbox.interfaces.placement import AttemptLocation, Host
from sandbox.interfaces.runner import FinishAttempt, Order, RunAttempt, RunDebugSession, RunnerNotStartedError
from sandbox.interfaces.task_file_layout import AttemptLayout, TaskLayout, runner_socket
from sandbox.model.resources import transient_disk_error
from sandbox.placements.local.attempt_files import LocalAttemptFiles, has_disk_or_handle
from sandbox.placements.local.runner_starters import (
    FORK_SERVER_MODULE,
    RUNNER_MODULE,
    LaunchMessage,
    RunnerSettings,
    RunnerStarter,
)
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


ORDER_TIMEOUT_SECONDS = 30.0
"""A new runner is killed if it has not read its order within this time."""

_TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE, errno.ETIMEDOUT})
"""Errors, in addition to those of the disk, after which a later launch may succeed.

They occur if the host lacks processes, memory or descriptors, or if the runner did not read its order because it was
killed or the host was too busy.
"""


class LocalPlacement:
    """Starts one runner process per order. Implements `interfaces.placement.Placement`."""

    allocator = None

    def __init__(
        self,
        starter: RunnerStarter,
        data_dir: Path,
        run_dir: Path,
        host: Host,
        runner_settings: Callable[[], RunnerSettings],
        locks: JournalLocks,
        files: LocalAttemptFiles,
    ) -> None:
        """runner_settings: returns the current settings for runners; called for each launch."""
        self.host = host
        self.files = files
        self._starter = starter
        self._data_dir = data_dir
        self._run_dir = run_dir
        self._runner_settings = runner_settings
        self._locks = locks

    async def run(self) -> None:
        """Prepare the starter of the runners, and close it when cancelled. Implements `Placement.run`.

        Nothing else is needed: local runners write directly to the server's data directory.
        """
        try:
            with contextlib.suppress(OSError):  # the first launch tries again
                await asyncio.to_thread(self._starter.prepare)
            await asyncio.get_running_loop().create_future()
        finally:
            self._starter.close()

    async def launch(self, order: RunAttempt | FinishAttempt, writer: JournalWriter) -> LocalRunnerHandle:
        """Start a runner that inherits the journal's lock. Implements `Placement.launch`."""
        try:
            with self._locks.hand_over(writer) as lock_fd:
                await self.start_runner(order, lock_fd)
        except OSError as error:
            if transient_disk_error(error) is None and error.errno not in _TRANSIENT_ERRNOS:
                raise
            raise RunnerNotStartedError(error.errno, error.strerror, error.filename) from error
        return LocalRunnerHandle(order.task_id, order.attempt_id, self._socket(order.attempt_id), self._locks)

    def find_runner(self, location: AttemptLocation) -> LocalRunnerHandle:
        """Return the runner's handle; its socket might not exist. Implements `Placement.find_runner`."""
        task_id, attempt_id, _ = location
        return LocalRunnerHandle(task_id, attempt_id, self._socket(attempt_id), self._locks)

    def preserved_disk(self, location: AttemptLocation) -> "LocalPreservedDisk":
        """Return the disk. Implements `Placement.preserved_disk`."""
        layout = TaskLayout(self._data_dir, location.task_id).attempt(location.attempt_id)
        return LocalPreservedDisk(layout, self._socket(location.attempt_id), self.start_runner, self.files)

    def _socket(self, attempt_id: str) -> Path:
        return runner_socket(self._run_dir, attempt_id)

    async def start_runner(self, order: Order, lock_fd: int) -> None:
        """Start a runner that gets its message on stdin and the lock as `--lock-fd=N`.

        The caller must close `lock_fd`. Raises OSError if no runner was started or the runner did not read its order.
        """
        loop = asyncio.get_running_loop()
        # Use a duplicate: a cancelled caller may close its own descriptor while the thread continues.
        lock_copy_fd = os.dup(lock_fd)
        await asyncio.shield(loop.run_in_executor(None, self._start, order, lock_copy_fd, loop))

    def _start(self, order: Order, lock_fd: int, loop: asyncio.AbstractEventLoop) -> None:
        """Start the runner. Blocks, so it runs in a thread."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, lock_fd)
            message = LaunchMessage(order, self._runner_settings())
            order_read_fd, order_write_fd = os.pipe()
            stack.callback(os.close, order_write_fd)
            try:
                log_path = _create_log_directory(message)
                log_fd = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    pidfd = self._starter.start(message.settings.runtime, order_read_fd, log_fd, lock_fd)
                finally:
                    os.close(log_fd)
            finally:
                os.close(order_read_fd)
            try:
                _send_message(order_write_fd, msgspec.json.encode(message), pidfd, log_path)
            finally:
                loop.call_soon_threadsafe(loop.add_reader, pidfd, _reap, loop, pidfd)


def _send_message(order_write_fd: int, message: bytes, pidfd: int, log_path: Path) -> None:
    """Write the message to a runner's stdin, and kill a runner that does not read it. Raises OSError."""
    try:
        _write_all(order_write_fd, message, ORDER_TIMEOUT_SECONDS)
    except OSError as error:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        raise OSError(error.errno, f"The runner did not accept its order; see {log_path}") from error


def _write_all(pipe_fd: int, data: bytes, timeout_seconds: float) -> None:
    """Write all data within `timeout_seconds`. Raises TimeoutError, BrokenPipeError."""
    os.set_blocking(pipe_fd, False)
    poll = select.poll()
    poll.register(pipe_fd, select.POLLOUT)
    deadline = time.monotonic() + timeout_seconds
    while data:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "Nothing reads from the pipe")
        data = data[os.write(pipe_fd, data) :]


def _reap(loop: asyncio.AbstractEventLoop, pidfd: int) -> None:
    """Reap the process after it has ended; otherwise it would remain a zombie. A fork server reaps its own runners."""
    loop.remove_reader(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def _create_log_directory(message: LaunchMessage) -> Path:
    """Create the attempt's directory; return the path of the runner's log in it."""
    order = message.order
    path = TaskLayout(Path(message.settings.data_dir), order.task_id).attempt(order.attempt_id).runner_log
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
