"""The API's answers as plain dictionaries, with the keys that clients may count on."""

from __future__ import annotations

from typing import Any, TypedDict

Frame = dict[str, Any]
"""One event of a task: `type, task_id, seq, timestamp` and the type's own fields."""


class Submitted(TypedDict):
    """The answer to a submission."""

    task_id: str
    state: str
    message: str
    created_at: str
    links: dict[str, str]


class Progress(TypedDict):
    """The counters of a task; tokens and dollars as the gateway counted them."""

    output_bytes: int
    tool_calls: int
    current_tool: str | None
    last_activity_at: str | None
    turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    egress_denied: int


class TaskSummary(TypedDict):
    """A task as it stands in a list."""

    id: str
    name: str
    state: str
    labels: dict[str, str]
    created_at: str
    started_at: str | None
    finished_at: str | None
    state_changed_at: str
    state_message: str
    vm_name: str | None
    vm: dict[str, Any] | None
    exit_code: int | None
    error: dict[str, str] | None
    progress: Progress
    result: dict[str, Any] | None


class TaskStatus(TaskSummary):
    """A task with its manifest, the defaults filled in."""

    definition: dict[str, Any]


class TaskPage(TypedDict):
    """A part of the list of tasks."""

    tasks: list[TaskSummary]
    total_count: int
    limit: int
    offset: int
    has_more: bool
    next_cursor: str | None


class Cancellation(TypedDict):
    """The answer to a wish to cancel."""

    success: bool
    task_id: str
    previous_state: str
    new_state: str
    message: str
    cancelled_at: str


class Release(TypedDict):
    """The answer to the release of a preserved sandbox."""

    success: bool
    task_id: str
    message: str


class ArtifactEntry(TypedDict):
    """One artifact as it stands in a list."""

    name: str
    path: str
    size_bytes: int
    content_type: str
    checksum: str
    created_at: str
    download_url: str
    contains_secret: bool


class ArtifactList(TypedDict):
    """The artifacts of a task."""

    task_id: str
    artifacts: list[ArtifactEntry]
    total_count: int
    total_size_bytes: int
