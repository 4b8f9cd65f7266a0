"""Response types of the API: TypedDicts with the keys that clients may rely on.

A newer server may send further keys. Reading a key that an older server omits raises UnexpectedAnswerError. Times are
RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

State = Literal[
    "pending",
    "staging",
    "provisioning",
    "ready",
    "running",
    "completing",
    "completed",
    "failed",
    "failed_preserved",
    "cancelled",
]


class Links(TypedDict):
    """Related URL paths on the server."""

    self: str
    logs: str
    artifacts: str


class Submitted(TypedDict):
    """Response to a submission."""

    task_id: str
    state: State
    message: str
    created_at: str
    links: Links


class Progress(TypedDict):
    """Progress counters of a task; tokens and cost as counted by the gateway."""

    output_bytes: int
    tool_calls: int
    current_tool: str | None
    last_activity_at: str | None
    turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    egress_denied: int


class Vm(TypedDict):
    """A task's sandbox; the first four fields are None until they are known."""

    runtime: str | None
    tier: str | None
    isolates: str | None
    image: str | None
    profile: str
    cpus: int
    memory: str
    disk: str
    network_mode: str


class Failure(TypedDict):
    """Why a task failed: a code of docs/errors.md, and a message with the remedy."""

    code: str
    message: str


class Attempt(TypedDict):
    """One attempt to execute the task. followed_by: `again`, `resume` or `retry`; None for the last attempt."""

    number: int
    id: str
    started_at: str | None
    ended_at: str | None
    resumes: bool
    exit_code: int | None
    error: Failure | None
    followed_by: str | None


class Definition(TypedDict):
    """The manifest with defaults filled in; secrets by name only."""

    repository: dict[str, Any]
    claude: dict[str, Any]
    vm: dict[str, Any]
    secrets: list[dict[str, str]]
    lifecycle: dict[str, Any]


class Checked(TypedDict):
    """Response to the validation of a valid manifest."""

    dry_run: bool
    message: str
    definition: Definition


class TaskSummary(TypedDict):
    """A task in a list. result: the result event of Claude Code."""

    id: str
    name: str
    state: State
    labels: dict[str, str]
    created_at: str
    started_at: str | None
    finished_at: str | None
    state_changed_at: str
    state_message: str
    vm_name: str | None
    vm_ip: None
    vm: Vm
    exit_code: int | None
    error: Failure | None
    attempts: list[Attempt]
    progress: Progress
    result: dict[str, Any] | None


class Task(TaskSummary):
    """A task with its manifest. sandbox_kept: a preserved sandbox exists that can be inspected and released."""

    definition: Definition
    sandbox_kept: bool


class TaskPage(TypedDict):
    """A page of the task list."""

    tasks: list[TaskSummary]
    total_count: int
    limit: int
    offset: int
    has_more: bool
    next_cursor: str | None


class Cancellation(TypedDict):
    """Response to a cancellation."""

    success: bool
    task_id: str
    previous_state: State
    new_state: State
    message: str
    cancelled_at: str


class Release(TypedDict):
    """Response to the release of a preserved sandbox."""

    success: bool
    task_id: str
    message: str


class PrunedTask(TypedDict):
    """A task that was removed, or would be removed with `dry_run`."""

    id: str
    state: str
    finished_at: str
    size_bytes: int


class Pruned(TypedDict):
    """Response to pruning: the tasks that were removed, or would be removed with `dry_run`."""

    dry_run: bool
    tasks: list[PrunedTask]
    total_count: int
    total_size_bytes: int


class Artifact(TypedDict):
    """An artifact in a list. checksum: `sha256:` and hexadecimal digits."""

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
    artifacts: list[Artifact]
    total_count: int
    total_size_bytes: int


class Runtime(TypedDict):
    """Capabilities of a runtime on the server's machine. mend: the remedy if it does not work."""

    name: str
    works: bool
    tier: str
    isolates: list[str]
    gaps: list[str]
    limits: list[str]
    mend: str


class Occupancy(TypedDict):
    """Capacity for unfinished tasks, the reserved part of it, and the number of waiting tasks."""

    cpus: int
    cpus_promised: int
    memory_bytes: int
    memory_promised_bytes: int
    disk_bytes: int
    disk_promised_bytes: int
    waiting: int


class Health(TypedDict):
    """Health of the server. tasks: the number of tasks in each state."""

    status: str
    ready: bool
    reasons: list[str]
    version: str
    uptime_seconds: float
    tasks: dict[str, int]
    runtimes: list[Runtime]
    store: dict[str, bool]
    disk: dict[str, int]
    draining_since: str | None
    next_probe_at: str | None
    occupancy: Occupancy | None


class Mistake(TypedDict):
    """One error in a manifest; line and column are set for YAML."""

    field: str
    rule: str
    message: str
    line: int | None
    column: int | None


class ExistingTask(TypedDict):
    """The existing task with a duplicate id."""

    id: str
    state: State
    created_at: str


class Draining(TypedDict):
    """Progress of a drain; `since` is None if the server is not draining."""

    draining: bool
    since: str | None
    running: int
    waiting: int
