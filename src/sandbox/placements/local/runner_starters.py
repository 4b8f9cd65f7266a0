"""The start of a runner: as a new process or as a fork of a fork server, with a message on its standard input.

The message contains the server's order and the runner's settings.
"""

import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.runner import FinishAttempt, Order, RunAttempt, RunDebugSession
from sandbox.model.fixed_limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT
from sandbox.model.resources import Watermark

RUNNER_MODULE = "sandbox.bootstrap.runner"
"""The program of a new runner process. It must be an argument of the command, because it identifies runners."""

FORK_SERVER_MODULE = "sandbox.bootstrap.runner_fork_server"
"""The program of the fork server. It must be an argument of the command, because it identifies forked runners."""

PROCESS_TIMEOUT_SECONDS = 30.0
"""Time limit for a response of the fork server, after which it is killed, and for the end of a killed process."""


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
        None if they request none.
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

    The import takes most of a runner's start-up time, and runners share the memory of the modules. If the fork
    server has died, the next request starts a new one. The fork server exits with the process that created this object;
    the runners keep running.
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


NOT_RENEWED = 0.0
"""The deadline of a lease that has not been renewed yet."""


class RunnerSettings(msgspec.Struct, frozen=True):
    """Settings of every runner on this host, regardless of its order.

    data_dir, run_dir: paths of the journals and attempts, and of the control sockets.
    runtime: name of the runtime.
    excludes_emulation: the runtime was chosen by `auto`, so emulation is excluded.
    agent_programs: path of each agent's executable, keyed by the agent's manifest section. In a message of an earlier
        version, the only key is an empty string.
    disk_kind: the kind of disk that this host supports; a `plain` disk is a directory.
    can_confine: host programs that read untrusted data can be confined on this host.
    output_watermark: output is dropped if less disk space is free.
    lease_deadline: the first deadline of the gateway's lease, in seconds since the host booted (CLOCK_BOOTTIME);
        NOT_RENEWED until the first renewal, None if runners on this host have no lease.
    """

    data_dir: str
    run_dir: str
    runtime: str
    excludes_emulation: bool = False
    agent_programs: dict[str, str] = {}
    disk_kind: Literal["loop", "plain"] = "plain"
    can_confine: bool = False
    output_watermark: Watermark = Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)
    lease_deadline: float | None = None

    def agent_program(self, kind: str) -> str:
        """Return the path of this agent's executable; empty if the agent is not installed on this host."""
        return self.agent_programs.get(kind) or self.agent_programs.get("", "")


class LaunchMessage(msgspec.Struct, frozen=True, rename={"settings": "host"}):
    """An order and the runner's settings. It is sent through a pipe, because it contains secrets."""

    order: Order
    settings: RunnerSettings


class LegacyLaunchMessage(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={
        "is_debug_session": "visit",
        "disk_kind": "disks",
        "can_confine": "confines",
        "excludes_emulation": "auto",
    },
):
    """The message of earlier versions: one record for all orders and for the runner's settings.

    A server of such a version starts runners of this version if the installation is upgraded while the server is
    running.
    """

    task_id: str
    attempt_id: str
    data_dir: str
    run_dir: str
    runtime: str
    upstream: ModelUpstream | None = None
    finish: bool = False
    is_debug_session: bool = False
    resumes: bool = False
    agent_program: str = ""
    disk_kind: Literal["loop", "plain"] = "plain"
    can_confine: bool = False
    excludes_emulation: bool = False
    image: Image | None = None
    secrets: dict[str, str] = {}
    follow_redirects: bool = True
    output_watermark: Watermark = Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)
    version: int = 1

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return f"LegacyLaunchMessage({self.task_id!r}, {self.attempt_id!r})"

    def to_message(self) -> LaunchMessage:
        """Return the same order in the current form."""
        settings = RunnerSettings(
            self.data_dir,
            self.run_dir,
            self.runtime,
            excludes_emulation=self.excludes_emulation,
            agent_programs={"": self.agent_program},
            disk_kind=self.disk_kind,
            can_confine=self.can_confine,
            output_watermark=self.output_watermark,
        )
        return LaunchMessage(self._order(), settings)

    def _order(self) -> Order:
        if self.finish:
            return FinishAttempt(self.task_id, self.attempt_id, self.secrets)
        if self.is_debug_session:
            return RunDebugSession(self.task_id, self.attempt_id, self.image, self.secrets)
        return RunAttempt(
            self.task_id,
            self.attempt_id,
            self.upstream,
            self.image,
            self.secrets,
            resumes=self.resumes,
            clone_follows_redirects=self.follow_redirects,
            records_conversation=False,
        )


def decode_launch_message(data: bytes) -> LaunchMessage:
    """Decode a message of this or an earlier version.

    Raises msgspec.DecodeError if it is incomplete, msgspec.ValidationError if it is not a launch message.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    if "order" in fields:
        return msgspec.json.decode(data, type=LaunchMessage)
    return msgspec.json.decode(data, type=LegacyLaunchMessage).to_message()
