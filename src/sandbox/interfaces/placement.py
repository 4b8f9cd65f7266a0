"""Starts runners and communicates with them."""

from collections.abc import Collection
from typing import Literal, Protocol

import msgspec

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.terminals import TerminalConnection
from sandbox.model.disk_space import Watermark
from sandbox.model.errors import SandboxError
from sandbox.model.limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT


class LaunchOrder(
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
    """The launch order of a runner, sent through a pipe; never an argument list or a file.

    The encoded names are those of earlier versions, because their runners may read the order.

    finish: only end the attempt and collect what a dead runner left (finisher).
    is_debug_session: only create a sandbox with a preserved disk, for a debug session. The inherited lock is then the
        session's, not the journal's.
    resumes: the attempt takes over an earlier attempt's disk.
    excludes_emulation: the server chose the runtime (`auto`), so emulation is excluded.
    agent_program: host path of the agent's executable.
    follow_redirects: when it starts to clone, git may follow a redirect to a host other than the manifest's.
    disk_kind: the kind of disk that this host supports.
    image: the image of the manifest's profile, None for the host's own /usr.
    can_confine: host programs that read untrusted data can be confined on this host.
    output_watermark: output is dropped if less disk space is free.
    records_conversation: the server reads conversation events. One of an earlier version, whose files were replaced
        while it ran, would reject the journal.
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
    records_conversation: bool = False
    version: int = 1

    def __repr__(self) -> str:
        """Omit the secrets, which must not reach logs or tracebacks."""
        return f"LaunchOrder({self.task_id!r}, {self.attempt_id!r})"


class Placement(Protocol):
    """Starts runners."""

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """Start a runner in a new session that inherits the journal's lock. Raises OSError."""
        ...


class RunnerUnreachableError(SandboxError):
    """No runner responds for this attempt: its socket is not open yet, or the runner has exited."""

    code = "runner_unreachable"
    retryable = True


CANCEL_TOO_LATE = "The agent had already ended; the outcome is unchanged."
"""The response to a cancel request that came after the agent's exit, whichever process recorded that exit."""


class CancelOrder(msgspec.Struct, frozen=True, tag="cancel"):
    """Asks a runner to end its attempt. The `Reply` comes after the cancel request is on disk."""

    reason: str = ""
    force: bool = False


class TerminalOrder(
    msgspec.Struct, frozen=True, tag="terminal", rename={"is_agent_terminal": "agent", "is_read_only": "looks_on"}
):
    """Asks a runner for a terminal. A `Reply` comes first, then frames in both directions (`interfaces.terminals`).

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


class RunnerClient(Protocol):
    """Sends requests to runners by attempt id."""

    async def is_responsive(self, attempt_id: str) -> bool:
        """Return False if a process listens at the runner's socket and does not respond within 5 s.

        Returns True if no process listens, or if this process lacks the resources to connect.
        """
        ...

    async def cancel(self, attempt_id: str, order: CancelOrder) -> Reply:
        """Send the cancel request, within 5 s. Raises RunnerUnreachableError."""
        ...

    async def open_terminal(self, attempt_id: str, order: TerminalOrder) -> TerminalConnection:
        """Open a terminal in the attempt's sandbox, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
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
