"""Starts runners on this machine, as processes that outlive the server."""

import asyncio
import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from sandbox.interfaces.file_layout import TaskLayout, runner_socket
from sandbox.interfaces.journal import JournalWriter
from sandbox.interfaces.placement import AttemptLocation, Host
from sandbox.interfaces.runner import FinishAttempt, Order, RunAttempt, RunnerNotStartedError
from sandbox.model.disk_space import transient_disk_error
from sandbox.placements.local.attempt_files import LocalAttemptFiles
from sandbox.placements.local.launch_message import LaunchMessage, RunnerSettings
from sandbox.placements.local.runner_starters import RunnerStarter
from sandbox.placements.local.runners_and_disks import JournalLocks, LocalPreservedDisk, LocalRunnerHandle

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
