"""Events of a task: one tagged union, written to the journal and read by all other components."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec

from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, without_secret_sources
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task_state import TaskState

Stream = Literal["stdout", "stderr", "transcript"]
"""`transcript` has the agent's raw events if `stdout` is rendered from them. It reaches clients only as an artifact."""

RecordedAttemptId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9]{1,64}\Z")]
"""The id of an attempt, which also names the attempt's directory, socket and control group.

The pattern rejects unsafe names in an untrusted journal.
"""


CommitId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,64}\Z")]
"""The object name of a commit. Checked when a journal is read, because later tasks pass the name to git."""

SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9-]{0,63}\Z")]
"""The id of an agent's session, a UUID. Checked when a journal is read, because later tasks use the id as the name of a
file and as an argument of the agent."""


class _EventBase(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Base of all events; the tag is in `type`."""


class Idempotency(msgspec.Struct, frozen=True):
    """The idempotency key of a submission, and the SHA-256 (hex) of the submission's body."""

    key: str
    body_sha256: str


class Parent(msgspec.Struct, frozen=True, omit_defaults=True, rename={"chain_base_commit": "first_commit"}):
    """The task that this task continues, and the files inherited from it. The continued task may be removed later.

    The files are in the directory of this task's artifacts.

    task_id: the parent.
    chain_base_commit: the base commit of the first task of the chain.
    patches: the changes of the earlier tasks of the chain, oldest first; tasks that changed nothing are omitted.
    conversation: text of the earlier conversation.
    session_id, session: the agent's session, which this task's agent resumes; None if it gets `conversation` instead.
    """

    task_id: str
    chain_base_commit: CommitId
    patches: tuple[Artifact, ...]
    conversation: Artifact | None = None
    session_id: SessionId | None = None
    session: Artifact | None = None

    @property
    def files(self) -> tuple[Artifact, ...]:
        """All files inherited from the parent."""
        return (*self.patches, *(file for file in (self.conversation, self.session) if file is not None))


class TaskSubmitted(_EventBase, frozen=True, tag="task_submitted"):
    """The task was submitted. This event is in record 1 of every journal.

    parent: null unless the task continues another one.
    rerun_of: id of the task that this one runs again, if any. That task may be removed later.
    """

    task_id: str
    manifest: Manifest
    idempotency: Idempotency | None = None
    parent: Parent | None = None
    rerun_of: str | None = None


class AttemptStarted(_EventBase, frozen=True, tag="attempt_started"):
    """The intent to run an attempt; recorded before any resource of the attempt is created.

    resumes: the attempt takes over the previous attempt's disk, and the agent continues its session.
    """

    attempt_id: RecordedAttemptId
    runtime: str
    host: str
    boot_id: str = ""
    number: int = 1
    resumes: bool = False


class WorkspacePrepared(_EventBase, frozen=True, tag="workspace_prepared"):
    """The workspace contains the clone at `base_commit` (full hex object name)."""

    base_commit: CommitId


class SandboxCreated(_EventBase, frozen=True, tag="sandbox_created", rename={"sandbox_name": "vm_name"}):
    """The sandbox is ready."""

    sandbox_name: str
    tier: str
    image: str


class AgentStarted(_EventBase, frozen=True, tag="agent_started"):
    """The agent's process started; `session_id` is the UUID of its session.

    monotonic_seconds: seconds since the host booted, the clock that `lifecycle.timeout` uses.
    agent: the agent's name, for messages; empty in journals of earlier versions.
    """

    session_id: SessionId
    monotonic_seconds: float = 0.0
    agent: str = ""


_SHORT_ESCAPES = b'\b\t\n\f\r"\\'
_LONG_ESCAPES = bytes(set(range(32)) - set(_SHORT_ESCAPES))


def _escape_overhead_bytes(data: bytes) -> int:
    r"""Return how many bytes JSON escaping adds: 5 for `\u0001`, 1 for `\n`."""
    not_long_escaped_count = len(data.translate(None, _LONG_ESCAPES))
    unescaped_count = len(data.translate(None, _LONG_ESCAPES + _SHORT_ESCAPES))
    return 5 * (len(data) - not_long_escaped_count) + (not_long_escaped_count - unescaped_count)


class Output(_EventBase, frozen=True, tag="output", rename={"is_continued": "continued", "is_parsed": "parsed"}):
    """Output of the agent process: one line per event, including the newline if the line has one.

    A line longer than the limit is split; in every part but the last, `continued` is true. Exactly one of `text` and
    `base64` is set: `base64` if the data is not UTF-8 or JSON escaping would more than double it.

    is_parsed: the line that ends here is represented by conversation events, which come after this record and before
        the next line of the same stream. Always false in journals of earlier versions, which have no such events.
    """

    stream: Stream
    text: str | None = None
    base64: bytes | None = None
    is_continued: bool = False
    is_parsed: bool = False

    @classmethod
    def from_bytes(cls, stream: Stream, data: bytes, *, is_continued: bool = False, is_parsed: bool = False) -> Output:
        """Keep `data` exactly: as text if it is UTF-8 and JSON escaping at most doubles it, otherwise as base64."""
        if _escape_overhead_bytes(data) > len(data):
            return cls(stream, base64=data, is_continued=is_continued, is_parsed=is_parsed)
        try:
            return cls(stream, text=data.decode(), is_continued=is_continued, is_parsed=is_parsed)
        except UnicodeDecodeError:
            return cls(stream, base64=data, is_continued=is_continued, is_parsed=is_parsed)

    @property
    def data(self) -> bytes:
        """The original bytes."""
        return self.text.encode() if self.text is not None else self.base64 or b""

    @property
    def display_text(self) -> str:
        """The text for display, with U+FFFD in place of invalid UTF-8."""
        return self.text if self.text is not None else (self.base64 or b"").decode(errors="replace")


class AgentMessage(_EventBase, frozen=True, tag="agent_message"):
    """A piece of the conversation. Its text is untrusted and may contain any character.

    kind: `text` and `thinking` come from the agent; `prompt` starts a subagent; `notice` describes the agent itself,
        such as its version.
    parent_tool_use_id: the tool call whose subagent wrote the text; null in the main conversation.
    omitted_characters: number of characters that were cut from the end of the text.
    """

    text: str
    kind: Literal["text", "thinking", "prompt", "notice"] = "text"
    parent_tool_use_id: str | None = None
    omitted_characters: int = 0


class FileEdit(msgspec.Struct, frozen=True):
    """A change that a tool call requests: `old` is replaced by `new`. `old` is null if the whole file is written."""

    path: str
    old: str | None
    new: str


class ToolCallStarted(_EventBase, frozen=True, tag="tool_call_started"):
    """The agent called a tool. All text is untrusted; names and ids are printable.

    summary: what the call is about, on one printable line: a command, a path, a pattern.
    command: the shell command, if the tool runs one.
    edits: the changes, if the tool changes files.
    input: the other fields of the input, keyed by name; values that are not text are JSON.
    omitted_characters: number of characters that were cut from `command`, `edits` and `input`.
    omitted_fields: number of further fields of the input.
    """

    tool: str
    tool_use_id: str
    summary: str = ""
    command: str | None = None
    edits: tuple[FileEdit, ...] = ()
    input: dict[str, str] = {}
    parent_tool_use_id: str | None = None
    omitted_characters: int = 0
    omitted_fields: int = 0


class ToolResult(_EventBase, frozen=True, tag="tool_result"):
    """What a tool call returned to the agent. A `ToolCallEnded` event with the duration follows.

    output: untrusted text.
    in_background: the call continues in the background. `output` is preliminary; `ToolCallEnded` follows once it ends.
    exit_code: exit code of a shell command that failed; null if there is none or it is unknown.
    omitted_characters: number of characters that were cut from the end of the output.
    """

    tool_use_id: str
    output: str = ""
    is_error: bool = False
    exit_code: int | None = None
    omitted_characters: int = 0
    in_background: bool = False


class AgentResult(_EventBase, frozen=True, tag="agent_result"):
    """The agent ended a round of work. The last round of a task has the task's result.

    The end of a background command may start another round.

    text: the final message.
    reason: why the round ended, as a word from the agent's protocol; empty for a success.
    cost_usd: cost in USD as counted by the agent; null if the agent did not report it, or counted earlier tasks too.
    omitted_characters: number of characters that were cut from the end of the text.
    """

    text: str = ""
    is_error: bool = False
    reason: str = ""
    turns: int | None = None
    duration_ms: int | None = None
    cost_usd: float | None = None
    omitted_characters: int = 0


ConversationEvent = AgentMessage | ToolCallStarted | ToolResult | AgentResult
"""Events that represent the agent's own event stream, whatever its format."""


class ToolCallEnded(_EventBase, frozen=True, tag="tool_call"):
    """A tool call by the agent finished."""

    tool: str
    tool_use_id: str
    duration_ms: int
    is_error: bool = False


TOKENS_TOTAL_MAX = 2**53 - 1
"""Maximum total number of tokens. Larger integers have no exact value in the JSON parsers of some clients."""

COST_USD_MAX = 1e9
"""Maximum cost of a request, and of the total in `Progress`."""


class Usage(_EventBase, frozen=True, tag="usage"):
    """Tokens of one model request, counted by the gateway; `cost_usd` is null if the model has no known price.

    model: the model that responded. If several did, one without a price takes precedence.
    """

    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float | None = None


class Progress(_EventBase, frozen=True, tag="progress"):
    """A snapshot of a task's counters, recorded by the runner. Readers use the latest snapshot.

    `input_tokens` includes cached tokens. `cost_usd` sums the requests that have a price. `egress_denied` counts all
    refusals by the gateway, including those without an event. `conversation_bytes` is the size of the task's
    conversation events; clients do not see it. `current_subject` is what the call to `current_tool` is about. Without a
    tool, it says that the agent is waiting for a background call. It is untrusted, printable and at most
    CURRENT_SUBJECT_CHARACTERS_MAX characters long.
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
    conversation_bytes: int = 0
    current_subject: str | None = None


class Metrics(_EventBase, frozen=True, tag="metrics"):
    """Resource usage of the sandbox at one moment. A value that the host does not report is null.

    load_avg: load average of the host over one minute.
    """

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
    """Events missing from the journal, and the reason. `first_seq` and `last_seq` are 0 for events without numbers."""

    first_seq: int
    last_seq: int
    reason: str


class ErrorReported(_EventBase, frozen=True, tag="error"):
    """An error that did not by itself end the task."""

    error: str
    message: str


class CancelRequested(_EventBase, frozen=True, tag="cancel_requested"):
    """A cancel request, not a state. It is durable before the caller gets a response."""

    reason: str = ""
    force: bool = False


class AttemptFailed(_EventBase, frozen=True, tag="attempt_failed"):
    """A reason to end the attempt. The first recorded reason becomes the task's failure."""

    failure: Failure


class FollowUp(StrEnum):
    """The kind of a follow-up attempt; the first applicable kind is used.

    again: the attempt is run again, because the agent had not started. resume: a lost agent continues its session on
    its disk. retry: a failed agent starts again in a fresh workspace.
    """

    AGAIN = "again"
    RESUME = "resume"
    RETRY = "retry"


class AttemptTornDown(_EventBase, frozen=True, tag="attempt_ended"):
    """A failed attempt was torn down completely; another attempt may start."""


class FollowUpSkipped(_EventBase, frozen=True, tag="follow_up_forgone"):
    """A possible follow-up to a failed attempt is skipped.

    reason: human-readable.
    """

    follow_up: FollowUp
    reason: str


class AgentExited(_EventBase, frozen=True, tag="agent_exited"):
    """The agent process exited. `exit_code` is 128+n after signal n, and null if the exit code is unknown.

    `failure` is null only if the process exited with 0 and, without a terminal, its last result has `is_error: false`.
    `final_message` is the last message of the main conversation, at most FINAL_MESSAGE_CHARACTERS_MAX characters long;
    null in journals of earlier versions, if there is no message, and if the runner failed or died before the exit.
    """

    exit_code: int | None
    result: dict[str, Any] | None = None
    failure: Failure | None = None
    final_message: str | None = None


class ArtifactCollected(_EventBase, frozen=True, tag="artifact_collected"):
    """An artifact is stored completely and flushed to disk.

    diff: size of the patch, if the artifact is a complete patch. Missing in journals of earlier versions.
    """

    artifact: Artifact
    diff: DiffStatistics | None = None


class TaskFinished(_EventBase, frozen=True, tag="task_finished"):
    """The task is done and torn down. Earlier records determine the final state."""


Event = (
    TaskSubmitted
    | AttemptStarted
    | WorkspacePrepared
    | SandboxCreated
    | AgentStarted
    | Output
    | AgentMessage
    | ToolCallStarted
    | ToolResult
    | AgentResult
    | ToolCallEnded
    | Usage
    | Progress
    | Metrics
    | EgressDenied
    | Gap
    | ErrorReported
    | CancelRequested
    | AttemptFailed
    | AttemptTornDown
    | FollowUpSkipped
    | AgentExited
    | ArtifactCollected
    | TaskFinished
)


class Transition(msgspec.Struct, frozen=True):
    """A change of state, stored in the record of the event that caused it."""

    previous_state: TaskState | None
    new_state: TaskState
    message: str

    def __post_init__(self) -> None:
        """Remove operator-only content, which earlier versions wrote into the message."""
        if self.new_state.is_final:
            msgspec.structs.force_setattr(self, "message", without_secret_sources(self.message))


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event at its position in the journal.

    seq: 1, 2, 3 … without gaps; defines the order.
    epoch: the number of the writer.
    at: UTC wall clock, for display only.
    """

    seq: int
    epoch: int
    at: datetime
    event: Event
    transition: Transition | None = None
    version: int = 1
