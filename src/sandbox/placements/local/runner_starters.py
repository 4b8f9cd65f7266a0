"""Starts the processes of runners: as new processes, or as forks of a fork server."""

import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

RUNNER_MODULE = "sandbox.bootstrap.runner"
"""The program of a new runner process. It must be an argument of the command, because it identifies runners."""

FORK_SERVER_MODULE = "sandbox.bootstrap.runner_fork_server"
"""The program of the fork server. It must be an argument of the command, because it identifies forked runners."""

PROCESS_TIMEOUT_SECONDS = 30.0
"""A fork server is killed if it has not answered a request within this time. Killed processes get as long to end."""


class RunnerStarter(Protocol):
    """Starts runner processes."""

    def prepare(self) -> None:
        """Start what the first runner needs. Blocks. Raises OSError."""
        ...

    def start(self, runtime: str, order_read_fd: int, log_fd: int, lock_fd: int) -> int:
        """Start a runner, which inherits the lock. Blocks. Returns the runner's pidfd.

        runtime: name of the runtime whose modules the runner needs. order_read_fd: the runner's stdin. log_fd: the
        runner's stdout and stderr.

        If this raises OSError, a runner may have been started nevertheless. A runner exits if it gets no order, so
        close the write end of its stdin.
        """
        ...

    def close(self) -> None:
        """Stop what `prepare` started. The runners continue."""
        ...


class RunnerSpawner(NamedTuple):
    """Starts each runner as a new process. Implements `RunnerStarter`.

    command: contains RUNNER_MODULE. environment: the complete environment.
    parent_death_pipe_fd: the read end of a pipe. When its write end is closed, the kernel kills the runner. None if the
        runner may outlive this process.
    credentials_fd: the runners' end of the socket pair through which they request git credentials from this process.
        None if they do not.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    parent_death_pipe_fd: int | None = None
    credentials_fd: int | None = None

    def prepare(self) -> None:
        """Do nothing. Implements `RunnerStarter.prepare`."""

    def start(self, runtime: str, order_read_fd: int, log_fd: int, lock_fd: int) -> int:
        """Start the process. Implements `RunnerStarter.start`."""
        options = {"--parent-death-pipe-fd": self.parent_death_pipe_fd, "--credentials-fd": self.credentials_fd}
        inherited = {option: fd for option, fd in options.items() if fd is not None} | {"--lock-fd": lock_fd}
        process = subprocess.Popen(
            [*self.command, *(f"{option}={fd}" for option, fd in inherited.items())],
            stdin=order_read_fd,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            env=self.environment,
            start_new_session=True,
            pass_fds=tuple(inherited.values()),
        )
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PROCESS_TIMEOUT_SECONDS)
            raise
        # The caller waits for the process. Without a return code, Popen's destructor would warn about a running child.
        process.returncode = 0
        return pidfd

    def close(self) -> None:
        """Do nothing. Implements `RunnerStarter.close`."""


class RunnerForkServer:
    """A process that has imported everything that runners need, and forks each runner. Implements `RunnerStarter`.

    The import takes most of a runner's start-up time, and runners share the memory of the modules. A request after the
    process's death starts a new one. The fork server ends with this process; its runners do not.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """command: contains FORK_SERVER_MODULE. environment: the complete environment."""
        self._command = command
        self._environment = environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def prepare(self) -> None:
        """Start the fork server, if it is not running. Implements `RunnerStarter.prepare`."""
        with self._lock:
            self._connect()

    def start(self, runtime: str, order_read_fd: int, log_fd: int, lock_fd: int) -> int:
        """Fork a runner. Implements `RunnerStarter.start`."""
        with self._lock:
            control = self._connect()
            try:
                socket.send_fds(control, [runtime.encode()], [order_read_fd, log_fd, lock_fd])
                message, descriptors, _, _ = socket.recv_fds(control, 16, 1, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError as error:
                self._stop()
                raise TimeoutError(errno.ETIMEDOUT, "The fork server of the runners does not respond") from error
            except ConnectionError:
                message, descriptors = b"", []
            if descriptors:
                return descriptors[0]
            if message:
                raise OSError(int(message), os.strerror(int(message)))
            self._stop()
            raise BrokenPipeError(errno.EPIPE, "The fork server of the runners ended")

    def close(self) -> None:
        """Stop the fork server. Implements `RunnerStarter.close`."""
        with self._lock:
            self._stop()

    def _connect(self) -> socket.socket:
        """Return the control socket of a live fork server."""
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._control is None:
            control, fork_server_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            control.settimeout(PROCESS_TIMEOUT_SECONDS)
            try:
                with fork_server_control:
                    self._process = self._start_fork_server(fork_server_control.fileno())
            except BaseException:
                control.close()
                raise
            self._control = control
        return self._control

    def _start_fork_server(self, control_fd: int) -> subprocess.Popen[bytes]:
        """Start the fork server. Until it has imported everything, its errors go to the stderr of this process."""
        return subprocess.Popen(
            [*self._command, f"--control-fd={control_fd}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env=self._environment,
            start_new_session=True,
            pass_fds=(control_fd,),
        )

    def _stop(self) -> None:
        process, control = self._process, self._control
        self._process = self._control = None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PROCESS_TIMEOUT_SECONDS)
