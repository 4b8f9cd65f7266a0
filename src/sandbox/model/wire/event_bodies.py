"""The events that clients receive: the only declaration of each, as `task_bodies.py` declares the bodies about tasks.

`event_conversion.py` converts records of the journal to these events. They are sent as lines of NDJSON, as data of
server-sent events and as messages of a WebSocket. A newer server may send additional types and properties.
"""

from typing import Any, Literal, NotRequired, TypedDict, get_args

from sandbox.model.wire.task_bodies import FailureBody, ProgressBody, State, Timestamp


class BaseEvent(TypedDict):
    """The properties of every event."""

    task_id: str
    """Id of the task."""
    seq: int
    """Position among the events of the task. It increases, with gaps."""
    timestamp: Timestamp
    """When the event was recorded."""


class StateChangeEvent(BaseEvent):
    """The state of the task changed, or the stream begins and the event contains the current state."""

    type: Literal["state_change"]
    """Always `state_change`."""
    previous_state: State | None
    """Previous state; null for a new task, and if the stream begins with the current state.

    It is always null in `GET /tasks/stream`.
    """
    new_state: State
    """Current state."""
    state_message: str
    """Human-readable description of the current step or of the outcome."""


class AttemptEvent(BaseEvent):
    """A second or later attempt starts."""

    type: Literal["attempt"]
    """Always `attempt`."""
    attempt: int
    """Position among the attempts, from 1."""
    attempt_id: str
    """Id of the attempt."""
    resumes: bool
    """Whether the agent continues its session, with the disk of the previous attempt."""


class AgentMessageItem(TypedDict):
    """A piece of the conversation. Its text is untrusted, and may contain any character."""

    type: Literal["agent_message"]
    """Always `agent_message`."""
    text: str
    """The text."""
    kind: Literal["text", "thinking", "prompt", "notice"]
    """`text` and `thinking` come from the agent; `prompt` starts a subagent; `notice` describes the agent itself."""
    parent_tool_use_id: str | None
    """The tool call whose subagent wrote the text; null in the main conversation."""
    omitted_characters: int
    """Number of characters that were cut from the end of the text."""


class FileEditBody(TypedDict):
    """A file change that a tool call requests."""

    path: str
    """Path of the file."""
    old: str | None
    """The text that is replaced; null if the whole file is written."""
    new: str
    """The text that replaces it."""


class ToolCallStartedItem(TypedDict):
    """The agent calls a tool. All text is untrusted; names and ids are printable."""

    type: Literal["tool_call_started"]
    """Always `tool_call_started`."""
    tool: str
    """Name of the tool."""
    tool_use_id: str
    """Id of the call; the events of its result and its end have the same id."""
    summary: str
    """What the call is about, on one printable line: a command, a path, a pattern."""
    command: str | None
    """The shell command, if the tool runs one."""
    edits: list[FileEditBody]
    """The changes, if the tool changes files."""
    input: dict[str, str]
    """The other fields of the input, by name; values that are not text are JSON."""
    parent_tool_use_id: str | None
    """The tool call whose subagent calls the tool; null in the main conversation."""
    omitted_characters: int
    """Number of characters that were cut from `command`, `edits` and `input`."""
    omitted_fields: int
    """Number of further fields of the input."""


class ToolResultItem(TypedDict):
    """What a tool returned to the agent."""

    type: Literal["tool_result"]
    """Always `tool_result`."""
    tool_use_id: str
    """Id of the call."""
    output: str
    """The result. It is untrusted, and may contain any character."""
    is_error: bool
    """Whether the call failed."""
    exit_code: int | None
    """Exit code of a shell command that failed; null if there is none or it is unknown."""
    omitted_characters: int
    """Number of characters that were cut from the end of the output."""
    in_background: bool
    """Whether the call continues in the background; its `tool_call` event follows once it ends."""


class AgentResultItem(TypedDict):
    """The agent ended a round of work. The last round of a task has the task's final message."""

    type: Literal["agent_result"]
    """Always `agent_result`."""
    text: str
    """The final message. It is untrusted, and may contain any character."""
    is_error: bool
    """Whether the round failed."""
    reason: str
    """Why the round ended, as a word of the agent's protocol; empty for a success."""
    turns: int | None
    """Number of the model's turns, as counted by the agent."""
    duration_ms: int | None
    """Duration in milliseconds, as measured by the agent."""
    cost_usd: float | None
    """Cost in USD, as counted by the agent.

    Null if the agent did not report it, or continued an earlier task's session, whose cost the report includes.
    """
    omitted_characters: int
    """Number of characters that were cut from the end of the text."""


ConversationItem = AgentMessageItem | ToolCallStartedItem | ToolResultItem | AgentResultItem
"""An item of the agent's own event stream, in a format that is the same for all agents.

An event with such an item also has `task_id`, `seq` and `timestamp`.
"""


class AgentMessageEvent(BaseEvent, AgentMessageItem):
    """A piece of the conversation. Its text is untrusted, and may contain any character."""


class ToolCallStartedEvent(BaseEvent, ToolCallStartedItem):
    """The agent calls a tool. All text is untrusted; names and ids are printable."""


class ToolResultEvent(BaseEvent, ToolResultItem):
    """What a tool returned to the agent. A `tool_call` event with the duration follows."""


class AgentResultEvent(BaseEvent, AgentResultItem):
    """The agent ended a round of work. The last round of a task has the task's final message."""


class ConversationEvent(BaseEvent):
    """Events of the conversation of a task that an earlier version of Sandbox ran."""

    type: Literal["conversation"]
    """Always `conversation`."""
    conversation: list[ConversationItem]
    """The events, without `task_id`, `seq` and `timestamp`."""


class OutputEvent(BaseEvent):
    """A line of output of the agent process, including its newline if there is one, or a part of a long line."""

    type: Literal["output"]
    """Always `output`."""
    stream: Literal["stdout", "stderr"]
    """Stream to which the agent process wrote the output."""
    data: str
    """The text, with U+FFFD in place of invalid UTF-8."""
    bytes: int
    """Number of bytes of the output."""
    continued: bool
    """Whether the line continues in the next event."""
    parsed: bool
    """Whether conversation events represent the line that ends here, so a readable view can omit the line."""
    conversation: NotRequired[list[ConversationItem]]
    """The conversation events of the line, without `task_id`, `seq` and `timestamp`.

    Present only if an earlier version of Sandbox ran the task.
    """


class ProgressEvent(BaseEvent):
    """The counters of the work so far."""

    type: Literal["progress"]
    """Always `progress`."""
    progress: ProgressBody
    """The counters of the status."""


class MetricsBody(TypedDict):
    """Resource usage of a sandbox. A value that the runtime cannot measure is null."""

    cpu_percent: float | None
    """CPU usage since the last sample, in percent of one CPU."""
    memory_used_bytes: int | None
    """Memory in use, in bytes."""
    memory_total_bytes: int | None
    """Memory limit, in bytes."""
    disk_used_bytes: int | None
    """Disk space in use, in bytes."""
    disk_total_bytes: int | None
    """Size of the disk, in bytes."""
    load_avg: float | None
    """Load of the host, averaged over one minute."""


class MetricsEvent(BaseEvent):
    """A sample of the sandbox's resource usage."""

    type: Literal["metrics"]
    """Always `metrics`."""
    metrics: MetricsBody
    """The measured values."""


class ToolCallEvent(BaseEvent):
    """A tool call of the agent ended."""

    type: Literal["tool_call"]
    """Always `tool_call`."""
    tool: str
    """Name of the tool."""
    tool_use_id: str
    """Id of the call."""
    duration_ms: int
    """Duration in milliseconds."""
    is_error: bool
    """Whether the call failed."""


class UsageEvent(BaseEvent):
    """Tokens and cost of one model request, counted by the gateway."""

    type: Literal["usage"]
    """Always `usage`."""
    model: str
    """The model that responded."""
    input_tokens: int
    """Input tokens, excluding cached tokens."""
    output_tokens: int
    """Output tokens."""
    cache_read_tokens: int
    """Input tokens that were read from the cache."""
    cache_write_tokens: int
    """Input tokens that were written to the cache."""
    cost_usd: float | None
    """Cost in USD; null for a model without a price."""


class EgressDeniedEvent(BaseEvent):
    """The gateway refused a connection, a request or a name."""

    type: Literal["egress_denied"]
    """Always `egress_denied`."""
    host: str
    """Host that a program in the sandbox tried to reach."""
    port: int
    """Port of that host."""
    reason: str
    """Human-readable reason."""


class ErrorEvent(BaseEvent):
    """An error occurred."""

    type: Literal["error"]
    """Always `error`."""
    error: str
    """A stable, machine-readable code. Later versions may add codes."""
    message: str
    """Human-readable cause and remedy."""
    details: None
    """Always null."""


class GapEvent(BaseEvent):
    """Events are missing.

    `first_seq` and `last_seq` are 0 if the missing data never had a position, such as output that exceeded the limit.
    """

    type: Literal["gap"]
    """Always `gap`."""
    first_seq: int
    """Position of the first missing event."""
    last_seq: int
    """Position of the last missing event."""
    reason: str
    """Why the events are missing."""


class EndEvent(BaseEvent):
    """The task reached its final state. No event follows."""

    type: Literal["end"]
    """Always `end`."""
    state: State
    """Final state."""
    exit_code: int | None
    """Exit code of the agent; 128 plus the signal number if a signal ended the agent; null if unknown."""
    error: FailureBody | None
    """Why the task failed."""


Event = (
    StateChangeEvent
    | AttemptEvent
    | OutputEvent
    | AgentMessageEvent
    | ToolCallStartedEvent
    | ToolResultEvent
    | AgentResultEvent
    | ConversationEvent
    | ProgressEvent
    | MetricsEvent
    | ToolCallEvent
    | UsageEvent
    | EgressDeniedEvent
    | ErrorEvent
    | GapEvent
    | EndEvent
)
"""An event of a task. The discriminator is `type`."""


def event_type(event: Any) -> str:
    """Return the value of `type` for a class of events."""
    (name,) = get_args(event.__annotations__["type"])
    return str(name)


EVENT_TYPES = frozenset(map(event_type, get_args(Event)))
CONVERSATION_TYPES = frozenset(map(event_type, get_args(ConversationItem))) | {event_type(ConversationEvent)}
"""Types of the events that represent the agent's messages, tool calls and results."""
