"""Starts runners on this machine, as processes that outlive the server."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from errno import ETIMEDOUT
from pathlib import Path

import msgspec

from sandbox.interfaces.placement import LaunchOrder

ORDER_SECONDS = 30.0
"""A new runner is killed if it has not read its order within this time."""


class LocalPlacement:
    """Runs `command` for every order. Implements `interfaces.placement.Placement`.

    environment: the runner's complete environment. log_path: returns the file for the output of an order's runner.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log_path: Callable[[LaunchOrder], Path]
    ) -> None:
        self._command = tuple(command)
        self._environment = dict(environment)
        self._log_path = log_path

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """Start a runner that gets its order on stdin and the journal's lock as `--lock-fd=N`.

        The caller still closes `lock_fd`. Raises OSError if no runner was started or the runner did not read its order.
        """
        loop = asyncio.get_running_loop()
        # Use a duplicate: a cancelled caller may close its own descriptor while the thread continues.
        lock_copy_fd = os.dup(lock_fd)
        await asyncio.shield(loop.run_in_executor(None, self._start, order, lock_copy_fd, loop))

    def _start(self, order: LaunchOrder, lock_fd: int, loop: asyncio.AbstractEventLoop) -> None:
        """Start the runner. Blocks, so it runs in a thread."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, lock_fd)
            order_in, order_out = os.pipe()
            stack.callback(os.close, order_out)
            try:
                log_path = self._log_path(order)
                pidfd = self._spawn(order_in, log_path, lock_fd)
            finally:
                os.close(order_in)
            try:
                _send_order(order_out, msgspec.json.encode(order), pidfd, log_path)
            finally:
                loop.call_soon_threadsafe(loop.add_reader, pidfd, _reap, loop, pidfd)

    def _spawn(self, order_in: int, log_path: Path, lock_fd: int) -> int:
        """Start the process. Returns its pidfd."""
        log_fd = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(
                [*self._command, f"--lock-fd={lock_fd}"],
                stdin=order_in,
                stdout=log_fd,
                stderr=log_fd,
                cwd="/",
                env=self._environment,
                start_new_session=True,
                pass_fds=(lock_fd,),
            )
        finally:
            os.close(log_fd)
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ORDER_SECONDS)
            raise
        # `_reap` waits for the process. Without a return code, Popen's destructor would warn about a running child.
        process.returncode = 0
        return pidfd


def _send_order(order_out: int, order: bytes, pidfd: int, log_path: Path) -> None:
    """Write the order to a runner's stdin, and kill a runner that does not read it. Raises OSError."""
    try:
        _write_all(order_out, order, ORDER_SECONDS)
    except OSError as error:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        raise OSError(error.errno, f"The runner did not accept its order; see {log_path}") from error


def _write_all(pipe_fd: int, data: bytes, seconds: float) -> None:
    """Write all data within `seconds`. Raises TimeoutError, BrokenPipeError."""
    os.set_blocking(pipe_fd, False)
    poll = select.poll()
    poll.register(pipe_fd, select.POLLOUT)
    deadline = time.monotonic() + seconds
    while data:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(ETIMEDOUT, "The pipe is not read")
        data = data[os.write(pipe_fd, data) :]


def _reap(loop: asyncio.AbstractEventLoop, pidfd: int) -> None:
    """Reap the ended process, which would otherwise stay a zombie."""
    loop.remove_reader(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
