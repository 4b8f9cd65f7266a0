"""What happens to a task, as the dictionaries that the server sends; `type` tells them apart.

Types that are not here may come from a newer server: pass over them.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from sandbox.client.responses import Failure, Progress, State


class BaseEvent(TypedDict):
    """What every event has. seq: its place in the task's story, growing."""

    task_id: str
    seq: int
    timestamp: str


class StateChange(BaseEvent):
    """The task is in another state; no previous one where a client is told the present state first."""

    type: Literal["state_change"]
    previous_state: State | None
    new_state: State
    state_message: str


class AttemptBegun(BaseEvent):
    """A second or later attempt begins; `resumes`: the agent goes on in its session."""

    type: Literal["attempt"]
    attempt: int
    attempt_id: str
    resumes: bool


class Output(BaseEvent):
    """A line of the agent process; `continued`: it goes on in the next one."""

    type: Literal["output"]
    stream: Literal["stdout", "stderr"]
    data: str
    bytes: int
    continued: bool


class ProgressMade(BaseEvent):
    """The counters of the task have moved."""

    type: Literal["progress"]
    progress: Progress


class Metrics(TypedDict):
    """What a sandbox uses; None for what its runtime cannot tell."""

    cpu_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    disk_used_bytes: int | None
    disk_total_bytes: int | None
    load_avg: float | None


class Measured(BaseEvent):
    """What the sandbox uses."""

    type: Literal["metrics"]
    metrics: Metrics


class ToolCall(BaseEvent):
    """The agent has used a tool."""

    type: Literal["tool_call"]
    tool: str
    tool_use_id: str
    duration_ms: int
    is_error: bool


class Usage(BaseEvent):
    """What a model request cost; None for a model without a price."""

    type: Literal["usage"]
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float | None


class EgressDenied(BaseEvent):
    """Something inside wanted to reach what it may not."""

    type: Literal["egress_denied"]
    host: str
    port: int
    reason: str


class Trouble(BaseEvent):
    """Something went wrong; `error` is a code of docs/errors.md."""

    type: Literal["error"]
    error: str
    message: str
    details: Any


class Gap(BaseEvent):
    """Events were left out; both numbers are 0 for what never had one."""

    type: Literal["gap"]
    first_seq: int
    last_seq: int
    reason: str


class End(BaseEvent):
    """The task is in its final state, and nothing comes after this."""

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
