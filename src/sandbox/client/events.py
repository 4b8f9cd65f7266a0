"""Events of a task, as the dictionaries that the server sends; `type` distinguishes them.

A newer server may send additional types: ignore them.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from sandbox.client.responses import Failure, Progress, State


class BaseEvent(TypedDict):
    """Fields of every event. seq: increasing position among the task's events."""

    task_id: str
    seq: int
    timestamp: str


class StateChange(BaseEvent):
    """The state changed. `previous_state` is None if a stream begins with the current state."""

    type: Literal["state_change"]
    previous_state: State | None
    new_state: State
    state_message: str


class AttemptBegun(BaseEvent):
    """A second or later attempt started. resumes: the agent continues its session."""

    type: Literal["attempt"]
    attempt: int
    attempt_id: str
    resumes: bool


class Output(BaseEvent):
    """A line of output of the agent process. continued: the next event continues this line.

    parsed: conversation events represent the line that ends here, so a readable view omits it.
    conversation: these events, without the fields of `BaseEvent`, if an earlier version of Sandbox ran the task;
        otherwise they are separate events.
    """

    type: Literal["output"]
    stream: Literal["stdout", "stderr"]
    data: str
    bytes: int
    continued: bool
    parsed: bool
    conversation: NotRequired[list[dict[str, Any]]]


class AgentMessage(BaseEvent):
    """A text of the conversation. parent_tool_use_id: the tool call whose subagent wrote it."""

    type: Literal["agent_message"]
    text: str
    kind: Literal["text", "thinking", "prompt", "notice"]
    parent_tool_use_id: str | None
    omitted_characters: int


class FileEdit(TypedDict):
    """A requested change of a file. old: None if the whole file is written."""

    path: str
    old: str | None
    new: str


class ToolCallStarted(BaseEvent):
    """The agent called a tool. input: the fields that are not in `command` or `edits`."""

    type: Literal["tool_call_started"]
    tool: str
    tool_use_id: str
    summary: str
    command: str | None
    edits: list[FileEdit]
    input: dict[str, str]
    parent_tool_use_id: str | None
    omitted_characters: int
    omitted_fields: int


class ToolResult(BaseEvent):
    """What a tool call returned. exit_code: of its command, None if unknown."""

    type: Literal["tool_result"]
    tool_use_id: str
    output: str
    is_error: bool
    exit_code: int | None
    omitted_characters: int


class AgentResult(BaseEvent):
    """The agent ended a round of work; its last one has the final message."""

    type: Literal["agent_result"]
    text: str
    is_error: bool
    reason: str
    turns: int | None
    duration_ms: int | None
    cost_usd: float | None
    omitted_characters: int


class Conversation(BaseEvent):
    """Conversation events of a task that an earlier version of Sandbox ran, without the fields of `BaseEvent`."""

    type: Literal["conversation"]
    conversation: list[dict[str, Any]]


class ProgressMade(BaseEvent):
    """The progress counters changed."""

    type: Literal["progress"]
    progress: Progress


class Metrics(TypedDict):
    """Resource usage of a sandbox; None where the runtime cannot measure a value."""

    cpu_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    disk_used_bytes: int | None
    disk_total_bytes: int | None
    load_avg: float | None


class Measured(BaseEvent):
    """A resource usage sample of the sandbox."""

    type: Literal["metrics"]
    metrics: Metrics


class ToolCall(BaseEvent):
    """The agent used a tool."""

    type: Literal["tool_call"]
    tool: str
    tool_use_id: str
    duration_ms: int
    is_error: bool


class Usage(BaseEvent):
    """Usage and cost of a model request. cost_usd: None for a model without a price."""

    type: Literal["usage"]
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float | None


class EgressDenied(BaseEvent):
    """A connection from the sandbox was denied."""

    type: Literal["egress_denied"]
    host: str
    port: int
    reason: str


class Trouble(BaseEvent):
    """An error occurred; `error` is a code of docs/errors.md."""

    type: Literal["error"]
    error: str
    message: str
    details: Any


class Gap(BaseEvent):
    """Events are missing; both numbers are 0 for events that have no seq."""

    type: Literal["gap"]
    first_seq: int
    last_seq: int
    reason: str


class End(BaseEvent):
    """The task reached its final state; no event follows."""

    type: Literal["end"]
    state: State
    exit_code: int | None
    error: Failure | None


Event = (
    StateChange
    | AttemptBegun
    | Output
    | ProgressMade
    | Measured
    | AgentMessage
    | ToolCallStarted
    | ToolResult
    | AgentResult
    | Conversation
    | ToolCall
    | Usage
    | EgressDenied
    | Trouble
    | Gap
    | End
)
