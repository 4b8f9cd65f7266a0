"""Response schemas for `openapi.json`. Tests validate responses against them; the server does not."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sandbox.model.task_state import TaskState


class Body(BaseModel):
    """No answer has a key that its schema does not name."""

    model_config = ConfigDict(extra="forbid")


class LinksBody(Body):
    """Where to go on."""

    self: str
    logs: str
    artifacts: str


class SubmittedBody(Body):
    """The task was taken and will survive a crash of the server."""

    task_id: str
    state: Literal["pending"]
    message: str
    created_at: datetime
    links: LinksBody


class DryRunBody(Body):
    """The server would take this manifest now; nothing was submitted."""

    dry_run: Literal[True]
    message: str
    definition: "DefinitionBody"


class FailureBody(Body):
    """Why the task failed: a stable code and a sentence that says what to do."""

    code: str
    message: str


class VmBody(Body):
    """The sandbox. `runtime`, `tier`, `image`, and `isolates` (what the tier is) are null until it is known."""

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
    """Counters of the work so far; tokens, cost and refusals as counted at the gateway."""

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
    """Why an attempt follows another; the first one that may be is taken.

    again: the agent had not begun. resume: a lost agent goes on in its session, on its disk. retry: from the beginning.
    """

    AGAIN = "again"
    RESUME = "resume"
    RETRY = "retry"


class AttemptBody(Body):
    """One try at carrying the task out. followed_by: why another one came after it."""

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
    """What was asked for, with the defaults filled in."""

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
    """A task. sandbox_kept: it has failed, and its sandbox is there until it is released or its time is over."""

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
    """The wish is recorded; the task ends soon."""

    success: Literal[True]
    task_id: str
    previous_state: TaskState
    new_state: Literal["cancelled"]
    message: str
    cancelled_at: datetime


class ReleasedBody(Body):
    """The preserved sandbox is gone."""

    success: Literal[True]
    task_id: str
    message: str


class PrunedTaskBody(Body):
    """A task that is gone, or would be."""

    id: str
    state: TaskState
    finished_at: datetime
    size_bytes: int


class PrunedBody(Body):
    """What was removed, or would be with `dry_run`; the oldest end first."""

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
    """The server answers."""

    status: Literal["ok"]
    version: str


class ReadyBody(Body):
    """The server takes tasks and runs them."""

    status: Literal["ready"]


class RuntimeBody(Body):
    """What a runtime can do on this machine; `mend` says what to do when it does not work."""

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
    """What may be promised to unfinished tasks, what is, and how many tasks wait for more."""

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
    """How the server is. `next_probe_at`: while no runtime works, when they are probed again."""

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
    """How far a drain is. `running` tasks go on; those `waiting` begin once the drain is undone."""

    draining: bool
    since: datetime | None
    running: int
    waiting: int


class DetailBody(Body):
    """One mistake. `field` is its path, `line` and `column` its place in a YAML manifest."""

    field: str
    rule: str
    message: str
    line: int | None
    column: int | None


class ExistingTaskBody(Body):
    """The task that has the id already."""

    id: str
    state: TaskState
    created_at: datetime


class ProblemBody(Body):
    """Every error answer; RFC 9457 with more."""

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
    """Who the session is."""

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
