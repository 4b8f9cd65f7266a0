"""Where attempts are carried out, and how their runners are spoken to."""

from collections.abc import Collection
from typing import Literal, Protocol

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.terminals import TerminalConnection
from sandbox.model.disk_space import Watermark
from sandbox.model.errors import SandboxError
from sandbox.model.limits import OUTPUT_FREE_BYTES, OUTPUT_FREE_PERCENT


class LaunchOrder(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a runner is told when it starts; goes through a pipe, never an argument list or a file.

    finish: only end and collect what a dead runner left (the finisher). visit: only make a sandbox of a preserved disk,
    for shells; the lock that comes with the order is that of the visit then, and not the journal's. resumes: the
    attempt takes the disk of an earlier one over. auto: the server chose the runtime by itself, so nothing is emulated.
    agent_program: host path of the agent's executable. follow_redirects: git may be sent to another host than the
    manifest's when it begins to clone. disks: what kind this machine can make. image: what the
    manifest's profile stands for, None for the host's own /usr. confines: programs of the host's that read what is
    hostile can be confined on this machine. output_watermark: below it output is left out.
    """

    task_id: str
    attempt_id: str
    data_dir: str
    run_dir: str
    runtime: str
    upstream: ModelUpstream | None = None
    finish: bool = False
    visit: bool = False
    resumes: bool = False
    agent_program: str = ""
    disks: Literal["loop", "plain"] = "plain"
    confines: bool = False
    auto: bool = False
    image: Image | None = None
    secrets: dict[str, str] = {}
    follow_redirects: bool = True
    output_watermark: Watermark = Watermark(OUTPUT_FREE_PERCENT, OUTPUT_FREE_BYTES)
    version: int = 1

    def __repr__(self) -> str:
        """Without the secrets, so that no log or traceback has them."""
        return f"LaunchOrder({self.task_id!r}, {self.attempt_id!r})"


class Placement(Protocol):
    """Starts runners."""

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """Start a runner in a session of its own that inherits the journal's lock. Raises OSError."""
        ...


class RunnerUnreachableError(SandboxError):
    """No runner answers for this attempt: it has not opened its socket yet, or it is gone."""

    code = "runner_unreachable"
    retryable = True


CANCEL_TOO_LATE = "The agent had ended already; the task keeps its outcome."
"""What is said to a wish to cancel that came after the agent's exit, whoever wrote it down."""


class CancelOrder(msgspec.Struct, frozen=True, tag="cancel"):
    """Asks a runner to end its attempt; answered with a `Receipt` once the wish is on disk."""

    reason: str = ""
    force: bool = False


class TerminalOrder(msgspec.Struct, frozen=True, tag="terminal"):
    """Asks a runner for a terminal; answered with a `Receipt`, then frames go both ways (`contracts.terminals`).

    agent: the agent's own, else a shell. looks_on: never types. term: the client's kind of terminal.
    """

    rows: int
    columns: int
    agent: bool = False
    looks_on: bool = False
    term: str = "xterm-256color"


class Reply(msgspec.Struct, frozen=True):
    """A runner's answer on its control socket: one JSON line for one JSON line. unwritten: the disk did not take it."""

    done: bool
    message: str = ""
    unwritten: bool = False


class RunnerClient(Protocol):
    """Speaks to runners by attempt id."""

    async def is_responsive(self, attempt_id: str) -> bool:
        """False when something listens at the runner's socket and does not answer within 5 s.

        True where nobody listens, and where this process lacks what it takes to ask: that is no runner's fault.
        """
        ...

    async def cancel(self, attempt_id: str, order: CancelOrder) -> Reply:
        """Hand the wish over, within 5 s. Raises RunnerUnreachableError."""
        ...

    async def open_terminal(self, attempt_id: str, order: TerminalOrder) -> TerminalConnection:
        """A terminal of the attempt's sandbox, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
        ...


class Leftovers(Protocol):
    """Of one kind. Whether an attempt is over, and whose it is, the caller knows: it holds the task's lock."""

    @property
    def kind(self) -> str:
        """In a word or two, for operators."""
        ...

    @property
    def is_exclusive(self) -> bool:
        """Whether what is found is this server's by its place, so that nobody else can have it in use."""
        ...

    def attempt_ids(self) -> Collection[str]:
        """Attempts of which something is there, whoever's they are. Blocks. Raises OSError."""
        ...

    async def clean_up(self, attempt_id: str, files: AttemptLayout) -> None:
        """End what is there of an attempt that nobody carries out any more; again is fine.

        Raises AttemptError, OSError.
        """
        ...
