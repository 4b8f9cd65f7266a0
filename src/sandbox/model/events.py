"""What happens to a task: one tagged union, written to the journal and read by everybody else."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import msgspec

from sandbox.model.errors import Failure, without_secret_sources
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task_state import TaskState

ArtifactName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""What can be a file's name in one directory; journals are held to it when they are read."""


GENERATED_DIRECTORY = ".sandbox"
"""Where the paths of what Sandbox itself made begin; nothing that an agent wrote has such a path."""

METADATA_NAME = "metadata.json"
"""The name of the artifact that is kept last: no other follows it. After a failure some may be missing."""


class Artifact(msgspec.Struct, frozen=True):
    """A file kept after the sandbox is gone.

    name: unique in the task, never has a `/`.
    path: relative to the workspace root, or `.sandbox/<name>` for what Sandbox itself made.
    size_bytes, checksum: of the bytes as stored; checksum is `sha256:<64 hex digits>`.
    """

    name: ArtifactName
    path: str
    size_bytes: int
    content_type: str
    checksum: str
    contains_secret: bool = False

    @property
    def is_generated(self) -> bool:
        """Whether Sandbox itself made it."""
        return self.path.startswith(f"{GENERATED_DIRECTORY}/")


class Artifacts(tuple[Artifact, ...]):
    """A task's artifacts, each name once, that many can be added to one after the other.

    What finds a name is handed on to the next ones: only who adds to the same artifacts twice looks at all of them.
    """

    _by_name: dict[str, Artifact]

    def find(self, name: str) -> Artifact | None:
        """The one of this name."""
        return self._name_index().get(name)

    def with_artifact(self, artifact: Artifact) -> Self:
        """With this one as the last, in the place of an earlier one of its name."""
        by_name = self._name_index()
        del self._by_name
        by_name.pop(artifact.name, None)
        by_name[artifact.name] = artifact
        added = type(self)(by_name.values())
        added._by_name = by_name
        return added

    def _name_index(self) -> dict[str, Artifact]:
        if "_by_name" not in self.__dict__:
            self._by_name = {known.name: known for known in self}
        return self._by_name


Stream = Literal["stdout", "stderr", "transcript"]
"""`transcript` is the agent's own events where `stdout` is rendered from them; clients see it in the artifact only."""

AttemptId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9]{1,64}\Z")]
"""Names directories, sockets and control groups, so that a journal from elsewhere must not choose it freely."""


class _EventBase(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Base of all events; the tag stands in `type`."""


class Idempotency(msgspec.Struct, frozen=True):
    """The caller's key for one submission, and the SHA-256 (hex) of the body that came with it."""

    key: str
    body_sha256: str


class TaskSubmitted(_EventBase, frozen=True, tag="task_submitted"):
    """Record 1 of every journal."""

    task_id: str
    manifest: Manifest
    idempotency: Idempotency | None = None


class AttemptStarted(_EventBase, frozen=True, tag="attempt_started"):
    """The intent to carry the task out; written before anything of the attempt is created.

    resumes: it takes the disk of the attempt before over, and the agent goes on in its session.
    """

    attempt_id: AttemptId
    runtime: str
    host: str
    boot_id: str = ""
    number: int = 1
    resumes: bool = False


class WorkspacePrepared(_EventBase, frozen=True, tag="workspace_prepared"):
    """The clone stands in the workspace at `base_commit` (full hex object name)."""

    base_commit: str


class SandboxCreated(_EventBase, frozen=True, tag="sandbox_created"):
    """The sandbox answers."""

    vm_name: str
    tier: str
    image: str


class AgentStarted(_EventBase, frozen=True, tag="agent_started"):
    """Claude Code's process was started; `session_id` is Claude Code's own UUID for the conversation.

    monotonic_seconds: the machine's clock since its boot, which `lifecycle.timeout` is counted by.
    """

    session_id: str
    monotonic_seconds: float = 0.0


_SHORT_ESCAPES = b'\b\t\n\f\r"\\'
_LONG_ESCAPES = bytes(set(range(32)) - set(_SHORT_ESCAPES))


def _escapes_bytes(data: bytes) -> int:
    """What JSON adds to a text: `\\u0001` for one byte, `\\n` for another."""
    without_long = len(data.translate(None, _LONG_ESCAPES))
    without_any = len(data.translate(None, _LONG_ESCAPES + _SHORT_ESCAPES))
    return 5 * (len(data) - without_long) + (without_long - without_any)


class Output(_EventBase, frozen=True, tag="output"):
    """Bytes of the agent process, a line at a time (its newline included, where it has one).

    A line over the bound is split; every part but its last one is `continued`.
    Exactly one of `text` and `base64` is set: the latter for what is no UTF-8, or is mostly what JSON escapes.
    """

    stream: Stream
    text: str | None = None
    base64: bytes | None = None
    continued: bool = False

    @classmethod
    def from_bytes(cls, stream: Stream, data: bytes, *, continued: bool = False) -> Output:
        """Keep `data` exactly, as text where it is UTF-8 and JSON does not make more than twice as much of it."""
        if _escapes_bytes(data) > len(data):
            return cls(stream, base64=data, continued=continued)
        try:
            return cls(stream, text=data.decode(), continued=continued)
        except UnicodeDecodeError:
            return cls(stream, base64=data, continued=continued)

    @property
    def data(self) -> bytes:
        """The bytes as they came."""
        return self.text.encode() if self.text is not None else self.base64 or b""

    @property
    def display_text(self) -> str:
        """The text for people: what is not UTF-8 stands as U+FFFD."""
        return self.text if self.text is not None else (self.base64 or b"").decode(errors="replace")


class ToolCall(_EventBase, frozen=True, tag="tool_call"):
    """A tool call of the agent came to its end."""

    tool: str
    tool_use_id: str
    duration_ms: int
    is_error: bool = False


class Usage(_EventBase, frozen=True, tag="usage"):
    """Tokens of one model request, as counted at the gateway; `cost_usd` is null for a model without a price.

    `model`: which answered; where several did, the one without a price, if there is one.
    """

    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float | None = None


class Progress(_EventBase, frozen=True, tag="progress"):
    """A snapshot of the counters of a task. The runner makes it; everybody else reads the latest.

    `input_tokens` counts cached tokens too; `cost_usd` sums the requests that have a price; `egress_denied` counts what
    the gateway refused, whether it was told one by one or not.
    """

    output_bytes: int = 0
    tool_calls: int = 0
    current_tool: str | None = None
    last_activity_at: datetime | None = None
    turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    egress_denied: int = 0


class Metrics(_EventBase, frozen=True, tag="metrics"):
    """What the sandbox used at a moment; null where this machine does not tell. load_avg: the host's, over a minute."""

    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    disk_used_bytes: int | None = None
    disk_total_bytes: int | None = None
    load_avg: float | None = None


class EgressDenied(_EventBase, frozen=True, tag="egress_denied"):
    """The gateway refused a connection, a request or a name."""

    host: str
    port: int
    reason: str


class Gap(_EventBase, frozen=True, tag="gap"):
    """Events that are not in the journal, and why (`first_seq`/`last_seq` are 0 when they never had a number)."""

    first_seq: int
    last_seq: int
    reason: str


class ErrorReported(_EventBase, frozen=True, tag="error"):
    """Something went wrong that did not by itself end the task."""

    error: str
    message: str


class CancelRequested(_EventBase, frozen=True, tag="cancel_requested"):
    """A wish, not a state; durable before the caller hears yes."""

    reason: str = ""
    force: bool = False


class AttemptFailed(_EventBase, frozen=True, tag="attempt_failed"):
    """A reason to end the attempt; the first one recorded is the task's."""

    failure: Failure


class RetryKind(StrEnum):
    """Why an attempt follows another; the first one that may be is taken.

    again: the agent had not begun. resume: a lost agent goes on in its session, on its disk. retry: from the beginning.
    """

    RESTART = "again"
    RESUME = "resume"
    RETRY = "retry"


class AttemptEnded(_EventBase, frozen=True, tag="attempt_ended"):
    """A failed attempt is cleared away: nothing of it lives, and another one may begin."""


class RetrySkipped(_EventBase, frozen=True, tag="follow_up_forgone"):
    """What might have followed a failed attempt does not, and why, for people."""

    follow_up: RetryKind
    reason: str


class AgentExited(_EventBase, frozen=True, tag="agent_exited"):
    """The agent's process is gone. `exit_code` is 128+n after signal n, null when it was never learnt.

    `failure` is null only when the process exited 0 and its last result says `is_error: false`.
    """

    exit_code: int | None
    result: dict[str, Any] | None = None
    failure: Failure | None = None


class ArtifactCollected(_EventBase, frozen=True, tag="artifact_collected"):
    """An artifact is stored, whole and flushed to disk."""

    artifact: Artifact


class TaskFinished(_EventBase, frozen=True, tag="task_finished"):
    """Everything is done and torn down; the final state follows from what was recorded before."""


Event = (
    TaskSubmitted
    | AttemptStarted
    | WorkspacePrepared
    | SandboxCreated
    | AgentStarted
    | Output
    | ToolCall
    | Usage
    | Progress
    | Metrics
    | EgressDenied
    | Gap
    | ErrorReported
    | CancelRequested
    | AttemptFailed
    | AttemptEnded
    | RetrySkipped
    | AgentExited
    | ArtifactCollected
    | TaskFinished
)


class Transition(msgspec.Struct, frozen=True):
    """A change of state, stamped into the record of the event that caused it."""

    previous_state: TaskState | None
    new_state: TaskState
    message: str

    def __post_init__(self) -> None:
        """Remove what only operators may read; earlier versions wrote it into the message."""
        if self.new_state.is_terminal:
            msgspec.structs.force_setattr(self, "message", without_secret_sources(self.message))


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event at its place in the journal.

    seq: 1, 2, 3 … without a hole; epoch: counts the writers; at: UTC wall clock, for people (seq orders).
    """

    seq: int
    epoch: int
    at: datetime
    event: Event
    transition: Transition | None = None
    version: int = 1
