"""Response schemas for `openapi.json`. Tests validate responses against them; the server does not."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sandbox.model.task_state import TaskState


class Body(BaseModel):
    """Base class that forbids undeclared keys."""

    model_config = ConfigDict(extra="forbid")


class LinksBody(Body):
    """Links to related resources."""

    self: str
    logs: str
    artifacts: str


class SubmittedBody(Body):
    """The task was accepted. It is durable: it survives a crash of the server."""

    task_id: str
    state: Literal["pending"]
    message: str
    created_at: datetime
    links: LinksBody


class DryRunBody(Body):
    """The server would accept this manifest now; nothing was submitted."""

    dry_run: Literal[True]
    message: str
    definition: "DefinitionBody"


class FailureBody(Body):
    """Why the task failed: a stable code, and a message that says what to do."""

    code: str
    message: str


class VmBody(Body):
    """The sandbox. `isolates` describes the tier. `runtime`, `tier`, `isolates` and `image` are null until known."""

    runtime: str | None
    tier: str | None
    isolates: str | None
    image: str | None
    profile: str
    cpus: int
    memory: str
    disk: str
    network_mode: str


class ProgressBody(Body):
    """Counters of the work so far. Tokens, cost and denied connections are counted by the gateway."""

    output_bytes: int
    tool_calls: int
    current_tool: str | None
    last_activity_at: datetime | None
    turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    egress_denied: int


class FollowUp(StrEnum):
    """Why another attempt follows; the first applicable kind is used.

    again: the agent had not started. resume: a lost agent continues its session on its disk. retry: from the beginning.
    """

    AGAIN = "again"
    RESUME = "resume"
    RETRY = "retry"


class AttemptBody(Body):
    """One attempt to run the task. followed_by: why another attempt followed."""

    number: int
    id: str
    started_at: datetime | None
    ended_at: datetime | None
    resumes: bool
    exit_code: int | None
    error: FailureBody | None
    followed_by: FollowUp | None


class SecretBody(Body):
    """A secret, by name only."""

    name: str


class DefinitionBody(Body):
    """The submitted manifest, with the defaults filled in."""

    repository: dict[str, Any]
    claude: dict[str, Any]
    vm: dict[str, Any]
    secrets: list[SecretBody]
    lifecycle: dict[str, Any]


class TaskItemBody(Body):
    """A task in a list."""

    id: str
    name: str
    state: TaskState
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    state_changed_at: datetime
    state_message: str
    vm_name: str | None
    vm_ip: None
    vm: VmBody
    exit_code: int | None
    error: FailureBody | None
    attempts: list[AttemptBody]
    progress: ProgressBody
    result: dict[str, Any] | None


class TaskBody(TaskItemBody):
    """A task. sandbox_kept: the task failed, and its sandbox is preserved until it is released or expires."""

    definition: DefinitionBody
    sandbox_kept: bool


class TaskListBody(Body):
    """A page of tasks."""

    tasks: list[TaskItemBody]
    total_count: int
    limit: int
    offset: int
    has_more: bool
    next_cursor: str | None


class CancelledBody(Body):
    """The cancel request is stored. The task ends shortly."""

    success: Literal[True]
    task_id: str
    previous_state: TaskState
    new_state: Literal["cancelled"]
    message: str
    cancelled_at: datetime


class ReleasedBody(Body):
    """The preserved sandbox was removed."""

    success: Literal[True]
    task_id: str
    message: str


class PrunedTaskBody(Body):
    """A task that was removed, or would be removed with `dry_run`."""

    id: str
    state: TaskState
    finished_at: datetime
    size_bytes: int


class PrunedBody(Body):
    """The tasks that were removed, or would be removed with `dry_run`, in the order in which they ended."""

    dry_run: bool
    tasks: list[PrunedTaskBody]
    total_count: int
    total_size_bytes: int


class ArtifactBody(Body):
    """One artifact."""

    name: str
    path: str
    size_bytes: int
    content_type: str
    checksum: str
    created_at: datetime
    download_url: str
    contains_secret: bool


class ArtifactListBody(Body):
    """All artifacts of a task."""

    task_id: str
    artifacts: list[ArtifactBody]
    total_count: int
    total_size_bytes: int


class AliveBody(Body):
    """The server responds."""

    status: Literal["ok"]
    version: str


class ReadyBody(Body):
    """The server accepts and runs tasks."""

    status: Literal["ready"]


class RuntimeBody(Body):
    """Capabilities of a runtime on this host. `mend`: how to fix the runtime if it does not work."""

    name: str
    works: bool
    tier: str
    isolates: list[str]
    gaps: list[str]
    limits: list[str]
    mend: str


class StoreBody(Body):
    """The index of tasks."""

    ok: bool


class OccupancyBody(Body):
    """Capacity for unfinished tasks, the reserved part of it (`_promised`), and the number of waiting tasks."""

    cpus: int
    cpus_promised: int
    memory_bytes: int
    memory_promised_bytes: int
    disk_bytes: int
    disk_promised_bytes: int
    waiting: int


class DiskBody(Body):
    """The file system of the data directory."""

    free_bytes: int
    total_bytes: int


class HealthBody(Body):
    """Health of the server. `next_probe_at`: the time of the next probe of the runtimes, while none of them works."""

    status: Literal["ok", "degraded"]
    ready: bool
    reasons: list[str]
    version: str
    uptime_seconds: float
    tasks: dict[TaskState, int]
    runtimes: list[RuntimeBody]
    next_probe_at: datetime | None
    store: StoreBody
    disk: DiskBody
    draining_since: datetime | None
    occupancy: OccupancyBody | None


class DrainBody(Body):
    """Progress of a drain. `running` tasks continue; `waiting` tasks start once the drain is undone."""

    draining: bool
    since: datetime | None
    running: int
    waiting: int


class DetailBody(Body):
    """One error in a request. `field`: the path of the field. `line`, `column`: its position in a YAML manifest."""

    field: str
    rule: str
    message: str
    line: int | None
    column: int | None


class ExistingTaskBody(Body):
    """The existing task with the same id."""

    id: str
    state: TaskState
    created_at: datetime


class ProblemBody(Body):
    """An error response: problem details (RFC 9457) with additional members."""

    error: str
    message: str
    details: list[DetailBody] | None
    request_id: str
    type: str
    title: str
    status: int
    detail: str
    instance: str
    existing_task: ExistingTaskBody | None = None
    task_state: TaskState | None = None
    requested_cpus: int | None = None
    available_cpus: int | None = None
    requested_memory: str | None = None
    available_memory: str | None = None
    reasons: list[str] | None = None


class SessionBody(BaseModel):
    """Role and name of the session's token."""

    role: Literal["viewer", "operator"]
    name: str


RESPONSE_BODIES: tuple[type[BaseModel], ...] = (
    SubmittedBody,
    DryRunBody,
    TaskBody,
    TaskListBody,
    CancelledBody,
    ReleasedBody,
    PrunedBody,
    ArtifactListBody,
    AliveBody,
    ReadyBody,
    HealthBody,
    DrainBody,
    SessionBody,
    ProblemBody,
)
"""All models to include in the schema."""
