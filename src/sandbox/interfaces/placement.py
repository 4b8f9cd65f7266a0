"""Starts runners and communicates with them."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import msgspec

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.journal import JournalWriter, Liveness
from sandbox.interfaces.terminals import TerminalConnection
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted


class RunAttempt(msgspec.Struct, frozen=True, tag="run_attempt"):
    """Run a new attempt, from its first step to its end.

    upstream: the model API; None if the server has no key for it.
    image: the image of the manifest's profile, None for the host's own /usr.
    secrets: values by name.
    resumes: the attempt takes over an earlier attempt's disk.
    follow_redirects: when it starts to clone, git may follow a redirect to a host other than the manifest's.
    records_conversation: the runner records conversation events. False for a server of an earlier version, which was
        upgraded while it ran: it would reject a journal with such events.
    """

    task_id: str
    attempt_id: str
    upstream: ModelUpstream | None = None
    image: Image | None = None
    secrets: dict[str, str] = {}
    resumes: bool = False
    follow_redirects: bool = True
    records_conversation: bool = True

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


class FinishAttempt(msgspec.Struct, frozen=True, tag="finish_attempt"):
    """End an attempt whose runner died, and collect what it left (finisher).

    secrets: values by name, to redact them in the collected files.
    """

    task_id: str
    attempt_id: str
    secrets: dict[str, str] = {}

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


class DebugSession(msgspec.Struct, frozen=True, tag="debug_session"):
    """Create a sandbox with a preserved disk, for shells. The session writes no journal.

    attempt_id: the attempt whose disk is preserved.
    image: as in `RunAttempt`.
    secrets: values by name, to redact them in the output of the shells.
    """

    task_id: str
    attempt_id: str
    image: Image | None = None
    secrets: dict[str, str] = {}

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return _describe(self)


Order = RunAttempt | FinishAttempt | DebugSession
"""What the server requests from a runner. The placement adds the settings of the host that the runner runs on."""


def _describe(order: Order) -> str:
    return f"{type(order).__name__}({order.task_id!r}, {order.attempt_id!r})"


class RunnerUnreachableError(SandboxError):
    """No runner responds for this attempt: its socket is not open yet, or the runner has exited."""

    code = "runner_unreachable"
    retryable = True


class RunnerNotStartedError(OSError):
    """No runner was started, or it did not read its order, for a temporary reason of its host.

    The host has no disk space, process, memory or descriptor to spare, is too busy, or the new runner was killed. The
    task is not at fault.
    """


CANCEL_TOO_LATE = "The agent had already ended; the outcome is unchanged."
"""The response to a cancel request that came after the agent's exit, whichever process recorded that exit."""


class CancelOrder(msgspec.Struct, frozen=True, tag="cancel"):
    """A request to a runner to end its attempt. The runner sends the `Reply` once the cancel request is on disk."""

    reason: str = ""
    force: bool = False


class TerminalOrder(
    msgspec.Struct, frozen=True, tag="terminal", rename={"is_agent_terminal": "agent", "is_read_only": "looks_on"}
):
    """A request to a runner for a terminal. After the `Reply`, both sides send frames (`interfaces.terminals`).

    is_agent_terminal: the agent's own terminal instead of a new shell.
    is_read_only: the client's input is not accepted.
    term: the client's terminal type.
    """

    rows: int
    columns: int
    is_agent_terminal: bool = False
    is_read_only: bool = False
    term: str = "xterm-256color"


class Reply(msgspec.Struct, frozen=True, rename={"was_disk_write_rejected": "unwritten"}):
    """Response on a runner's control socket, one JSON line for each request.

    was_disk_write_rejected: the request is not on disk.
    """

    done: bool
    message: str = ""
    was_disk_write_rejected: bool = False


class RunnerHandle(Protocol):
    """The runner or finisher of one attempt, alive or dead, wherever it runs.

    A task has one journal for all its attempts, and one lock. `liveness` and `kill` are about the holder of this lock,
    which is the runner of another attempt if one was launched since. The other methods reach this attempt only.
    """

    @property
    def attempt_id(self) -> str:
        """The id of the runner's attempt."""
        ...

    def liveness(self) -> Liveness:
        """Whether a process holds the lock of the task's journal now. Does not wait for other hosts. Raises OSError."""
        ...

    async def is_responsive(self) -> bool:
        """Return False if the runner is reachable and does not respond within 5 s.

        Returns True if it cannot be determined: no process listens, or this process lacks the resources to connect.
        """
        ...

    async def cancel(self, order: CancelOrder) -> Reply:
        """Send the cancel request, within 5 s. Raises RunnerUnreachableError."""
        ...

    async def open_terminal(self, order: TerminalOrder) -> TerminalConnection:
        """Open a terminal in the attempt's sandbox, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
        ...

    async def kill(self) -> bool:
        """Kill (SIGKILL) the runner that holds the lock of the task's journal; the kernel then releases the lock.

        Return whether there was one. Other holders of the lock, such as a server, are not killed.
        """
        ...


class PreservedDisk(Protocol):
    """The preserved disk of an attempt. At most one process uses it: the one that holds the disk's lock."""

    def try_lock(self) -> AbstractContextManager[Liveness]:
        """Hold the lock for the duration of the context if it is FREE. Yields its state before. Raises OSError."""
        ...

    async def start_session(self, order: DebugSession) -> None:
        """Start a runner that takes over the lock. Call it inside `try_lock` that yielded FREE. Raises OSError."""
        ...

    async def open_terminal(self, order: TerminalOrder) -> TerminalConnection:
        """Open a terminal in the running session, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
        ...


class Host(NamedTuple):
    """A host that runners are started on, and its current boot id (proc(5), random/boot_id)."""

    name: str
    boot_id: str

    def attempt_started(self, attempt_id: str, runtime: str, *, number: int, resumes: bool) -> AttemptStarted:
        """Return the event that records the intent to run an attempt on this host."""
        return AttemptStarted(attempt_id, runtime, self.name, self.boot_id, number=number, resumes=resumes)


class Placement(Protocol):
    """Starts runners on a host, and finds those that it or an earlier server started."""

    @property
    def host(self) -> Host:
        """The host of the next attempt."""
        ...

    async def launch(self, order: RunAttempt | FinishAttempt, writer: JournalWriter) -> RunnerHandle:
        """Start a runner, detached from this process, that takes over the journal.

        The runner also holds the lock of `writer` from now on; the caller still closes `writer`. Raises OSError if no
        runner was started or the runner did not read its order: RunnerNotStartedError if a later launch may succeed.
        """
        ...

    def find_runner(self, task_id: str, attempt_id: str) -> RunnerHandle:
        """Return the runner of an attempt, whether or not it is alive."""
        ...

    def preserved_disk(self, task_id: str, attempt_id: str) -> PreservedDisk:
        """Return the preserved disk of an attempt."""
        ...


class LeftoverSource(Protocol):
    """Finds and removes the leftovers of one kind.

    The caller holds the task's lock and determines whether the attempt belongs to this server and is over.
    """

    @property
    def kind(self) -> str:
        """A short name of the kind, for operators."""
        ...

    @property
    def is_exclusive(self) -> bool:
        """Whether the location guarantees that leftovers belong to this server and nothing else uses them."""
        ...

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts that have leftovers, of any owner. Blocks. Raises OSError."""
        ...

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Remove the leftovers of an attempt that no process runs anymore. Idempotent.

        Raises AttemptError, OSError.
        """
        ...
