"""The API's answers as the dictionaries that they are, with the keys that clients may count on.

What a newer server adds is in them too. Whoever reads a key that an older one does not tell gets UnexpectedAnswerError.
Times are RFC 3339 in UTC.
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
    """Where to go on, as paths of the server."""

    self: str
    logs: str
    artifacts: str


class Submitted(TypedDict):
    """The answer to a submission."""

    task_id: str
    state: State
    message: str
    created_at: str
    links: Links


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


class Vm(TypedDict):
    """A task's sandbox; the first four are None until it is known."""

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
    """Why a task failed: a code of docs/errors.md, and a sentence that says what to do."""

    code: str
    message: str


class Attempt(TypedDict):
    """One try at carrying the task out; followed_by: `again`, `resume` or `retry`, None of the last one."""

    number: int
    id: str
    started_at: str | None
    ended_at: str | None
    resumes: bool
    exit_code: int | None
    error: Failure | None
    followed_by: str | None


class Definition(TypedDict):
    """The manifest with the defaults filled in; secrets by name only."""

    repository: dict[str, Any]
    claude: dict[str, Any]
    vm: dict[str, Any]
    secrets: list[dict[str, str]]
    lifecycle: dict[str, Any]


class Checked(TypedDict):
    """The answer for a manifest that would be taken."""

    dry_run: bool
    message: str
    definition: Definition


class TaskSummary(TypedDict):
    """A task as it stands in a list. result: Claude Code's own last words."""

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
    """A task with its manifest; sandbox_kept: there is a preserved sandbox to look into, and to release."""

    definition: Definition
    sandbox_kept: bool


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
    previous_state: State
    new_state: State
    message: str
    cancelled_at: str


class Release(TypedDict):
    """The answer to the release of a preserved sandbox."""

    success: bool
    task_id: str
    message: str


class PrunedTask(TypedDict):
    """A task that is gone, or would be."""

    id: str
    state: str
    finished_at: str
    size_bytes: int


class Pruned(TypedDict):
    """The answer to pruning: what was removed, or would be with `dry_run`."""

    dry_run: bool
    tasks: list[PrunedTask]
    total_count: int
    total_size_bytes: int


class Artifact(TypedDict):
    """One artifact as it stands in a list; checksum: `sha256:` and its hexadecimal digits."""

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
    """What a runtime can do on the server's machine; `mend`: what to do where it does not work."""

    name: str
    works: bool
    tier: str
    isolates: list[str]
    gaps: list[str]
    limits: list[str]
    mend: str


class Occupancy(TypedDict):
    """What may be promised to unfinished tasks, what is, and how many tasks wait for more."""

    cpus: int
    cpus_promised: int
    memory_bytes: int
    memory_promised_bytes: int
    disk_bytes: int
    disk_promised_bytes: int
    waiting: int


class Health(TypedDict):
    """How the server is; tasks: how many there are in each state."""

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
    """One mistake of a manifest; line and column where it is YAML."""

    field: str
    rule: str
    message: str
    line: int | None
    column: int | None


class ExistingTask(TypedDict):
    """The task that has an id already."""

    id: str
    state: State
    created_at: str


class Draining(TypedDict):
    """How far a drain of the server is; `since` is null when it is not being drained."""

    draining: bool
    since: str | None
    running: int
    waiting: int
