"""The runner of an attempt: orders, requests and replies, and the frames of its terminals.

A terminal connection starts with one request and its reply; frames in both directions follow.
"""

from typing import Protocol

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.task_file_layout import AttemptId
from sandbox.model.errors import SandboxError

FRAME_BYTES_MAX = 256 * 1024
"""Maximum size of a frame, which is a message of `primitives.message_stream`."""


class OutputFrame(msgspec.Struct, frozen=True, tag="shown"):
    """Output of the terminal."""

    data: bytes


class WriteAccessFrame(msgspec.Struct, frozen=True, tag="role", rename={"may_write": "types"}):
    """States whether input from this client is accepted from now on. Only one client at a time may write."""

    may_write: bool


class EndFrame(msgspec.Struct, frozen=True, tag="ended"):
    """The last frame.

    exit_code: exit code of the terminal's process; None if the process is still running or its exit code is unknown.
    message: why the connection ended (human-readable), if it ended for a reason other than the exit of the process.
    """

    exit_code: int | None = None
    message: str = ""


class InputFrame(msgspec.Struct, frozen=True, tag="typed"):
    """Input from a client."""

    data: bytes


class ResizeFrame(msgspec.Struct, frozen=True, tag="resized"):
    """The width and height of a client's window, each 1 to 1000 characters."""

    rows: int
    columns: int


RunnerFrame = OutputFrame | WriteAccessFrame | EndFrame
ClientFrame = InputFrame | ResizeFrame


class TerminalRefusedError(SandboxError):
    """The requested terminal is not available now. The message says what to do."""

    code = "no_terminal"


class TerminalConnection(Protocol):
    """One client's connection to a terminal."""

    async def read(self) -> RunnerFrame:
        """Return the next frame; `EndFrame` at the end, even if the runner is gone."""
        ...

    async def send(self, frame: ClientFrame) -> None:
        """Send input or a window size. Waits until the runner accepts the data; does nothing on a closed connection."""
        ...

    async def close(self) -> None:
        """Disconnect. A shell exits when its connection is closed; the agent's terminal continues."""
        ...


class RunAttempt(
    msgspec.Struct, frozen=True, tag="run_attempt", rename={"clone_follows_redirects": "follow_redirects"}
):
    """Run a new attempt, from its first step to its end.

    upstream: the model API; None if the server has no key for it.
    image: the image of the manifest's profile, None for the host's own /usr.
    secrets: values by name.
    resumes: the attempt takes over an earlier attempt's disk.
    clone_follows_redirects: at the start of the clone, git may follow a redirect to a host other than the one in the
        manifest.
    records_conversation: the runner records conversation events. False if the server is older than the runner,
        because the server's files were replaced while it was running. An older server would reject a journal with
        conversation events.
    keeps_session: the runner stores the agent's session as an internal artifact. False if the server is older
        than the runner, because an older server would show the artifact to clients.
    """

    task_id: str
    attempt_id: AttemptId
    upstream: ModelUpstream | None = None
    image: Image | None = None
    secrets: dict[str, str] = {}
    resumes: bool = False
    clone_follows_redirects: bool = True
    records_conversation: bool = True
    keeps_session: bool = False

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


class FinishAttempt(msgspec.Struct, frozen=True, tag="finish_attempt"):
    """Run a finisher, which ends an attempt whose runner died and collects the attempt's files.

    secrets: values by name, to redact them in the collected files.
    keeps_session: as in `RunAttempt`.
    """

    task_id: str
    attempt_id: AttemptId
    secrets: dict[str, str] = {}
    keeps_session: bool = False

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


class RunDebugSession(msgspec.Struct, frozen=True, tag="debug_session"):
    """Create a sandbox with a preserved disk, for shells. The session writes no journal.

    attempt_id: the attempt whose disk is preserved.
    image: as in `RunAttempt`.
    secrets: values by name, to redact them in the shells' output.
    """

    task_id: str
    attempt_id: AttemptId
    image: Image | None = None
    secrets: dict[str, str] = {}

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


Order = RunAttempt | FinishAttempt | RunDebugSession
"""What the server requests from a runner. The placement adds the settings of its host's runners."""


def _describe(order: Order) -> str:
    return f"{type(order).__name__}({order.task_id!r}, {order.attempt_id!r})"


class RunnerUnreachableError(SandboxError):
    """No runner responds for this attempt: its socket is not open yet, or the runner has exited."""

    code = "runner_unreachable"
    retryable = True


class RunnerNotStartedError(OSError):
    """No runner was started, or the new runner did not read its order, because of a temporary problem on the host.

    Either the host is too busy or out of disk space, processes, memory or descriptors, or the new runner was killed.
    The task is not the cause.
    """


class CancelAttempt(msgspec.Struct, frozen=True, tag="cancel"):
    """A request to a runner to end its attempt. The runner sends the `Reply` once the cancel request is on disk."""

    reason: str = ""
    force: bool = False


class OpenTerminal(
    msgspec.Struct, frozen=True, tag="terminal", rename={"is_agent_terminal": "agent", "is_read_only": "looks_on"}
):
    """A request to a runner for a terminal. After the `Reply`, both sides send frames, such as `OutputFrame`.

    is_agent_terminal: the agent's own terminal instead of a new shell.
    is_read_only: the client's input is not accepted.
    term: the client's terminal type.
    """

    rows: int
    columns: int
    is_agent_terminal: bool = False
    is_read_only: bool = False
    term: str = "xterm-256color"


class RenewLease(msgspec.Struct, frozen=True, tag="renew_lease"):
    """A request to a runner to extend its lease. The runner's gateway may send data only until the lease expires.

    deadline: in seconds since the runner's host booted (CLOCK_BOOTTIME). An earlier deadline than the current one has
        no effect.
    """

    deadline: float


class Reply(msgspec.Struct, frozen=True, rename={"was_disk_write_rejected": "unwritten"}):
    """Response on a runner's control socket, one JSON line for each request.

    was_disk_write_rejected: the request is not on disk, because the disk rejected the write.
    """

    done: bool
    message: str = ""
    was_disk_write_rejected: bool = False


class RunnerHandle(Protocol):
    """The runner or finisher of one attempt, alive or dead, wherever it runs.

    A task has one journal for all its attempts, and one lock. `lock_state` and `kill` apply to the holder of this lock:
    if another attempt has been launched since, the holder is the runner of that attempt. The other methods apply only
    to the attempt of this handle. A request to a host that is not responding fails, but may still be carried out when
    the host responds again.
    """

    @property
    def attempt_id(self) -> str:
        """The id of the runner's attempt."""
        ...

    def lock_state(self) -> LockState:
        """Return whether a runner holds the task journal's lock now. Does not wait for other hosts. Raises OSError.

        FREE only after the server's data directory has every record that the runner wrote, or if no runner was ever
        started, or if the runner can no longer communicate: the last records of such a runner may be missing. UNKNOWN
        while the host is not responding, and until it has responded after a launch.
        """
        ...

    async def may_be_responsive(self) -> bool:
        """Return whether the runner responds within 5 s.

        Also returns True if this cannot be determined: no process listens, the host is not responding, or this process
        lacks the resources to connect.
        """
        ...

    async def cancel(self, request: CancelAttempt) -> Reply:
        """Send the cancel request, within 5 s. Raises RunnerUnreachableError."""
        ...

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Open a terminal in the attempt's sandbox, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
        ...

    async def kill(self) -> bool:
        """Kill (SIGKILL) the runner that holds the lock of the task's journal; the kernel then releases the lock.

        Return whether there was such a runner. Does not kill other holders of the lock, such as a server. Raises
        OSError; HostUnreachableError if the host does not respond within 5 s.
        """
        ...
