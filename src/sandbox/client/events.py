"""Events of a task, as the dictionaries that the server sends; `type` distinguishes them.

A newer server may send additional types: ignore them.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

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
    """A line of output of the agent process. continued: the next event continues this line."""

    type: Literal["output"]
    stream: Literal["stdout", "stderr"]
    data: str
    bytes: int
    continued: bool


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
    | ToolCall
    | Usage
    | EgressDenied
    | Trouble
    | Gap
    | End
)
