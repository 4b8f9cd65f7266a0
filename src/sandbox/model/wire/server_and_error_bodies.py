"""The JSON bodies about the server: health, hosts, drain, pruning, sessions, and its error responses.

`task_bodies.py` has the bodies about tasks.
"""

from typing import Annotated, Literal, TypedDict, get_args

from sandbox.model.wire.task_bodies import JsonSchema, State, Timestamp

_StateKey = Annotated[str, JsonSchema(enum=[*get_args(State)])]


class AliveBody(TypedDict):
    """The server responds."""

    status: Literal["ok"]
    """Always `ok`."""
    version: str
    """Version of the server."""


class ReadyBody(TypedDict):
    """The server accepts and runs tasks."""

    status: Literal["ready"]
    """Always `ready`."""


class RuntimeBody(TypedDict):
    """Capabilities of a runtime on this host."""

    name: str
    """Name of the runtime."""
    works: bool
    """Whether the runtime works on this host."""
    tier: str
    """Isolation tier: `namespaces`, `gvisor` or `vm`."""
    isolates: list[str]
    """What the runtime isolates."""
    gaps: list[str]
    """What the runtime does not isolate."""
    limits: list[str]
    """The limits that are enforced: `memory`, `cpus`, `processes`, `sockets`."""
    remedy: str
    """Why the runtime does not work, and how to fix it if that is known; empty if it works."""


class StoreBody(TypedDict):
    """The index of tasks."""

    ok: bool
    """Whether the index can be read and written."""


class OccupancyBody(TypedDict):
    """Capacity for unfinished tasks, the reserved part of it (`_reserved`), and the number of waiting tasks."""

    cpus: int
    """Number of CPUs for tasks."""
    cpus_reserved: int
    """Number of CPUs that are reserved."""
    memory_bytes: int
    """Memory for tasks, in bytes."""
    memory_reserved_bytes: int
    """Memory that is reserved, in bytes."""
    disk_bytes: int
    """Disk space for tasks, in bytes."""
    disk_reserved_bytes: int
    """Disk space that is reserved, in bytes."""
    waiting: int
    """Number of tasks that are waiting for resources."""


class DiskBody(TypedDict):
    """The file system of the data directory."""

    free_bytes: int
    """Free space, in bytes."""
    total_bytes: int
    """Total size, in bytes."""


class HealthBody(TypedDict):
    """Health of the server."""

    status: Literal["ok", "degraded"]
    """`ok` if the server accepts and runs tasks."""
    ready: bool
    """Whether the server accepts and runs tasks."""
    reasons: list[str]
    """Why the server does not accept or run tasks; human-readable."""
    version: str
    """Version of the server."""
    uptime_seconds: float
    """Time since the server started, in seconds."""
    tasks: dict[_StateKey, int]
    """Number of tasks in each state."""
    runtimes: list[RuntimeBody]
    """The runtimes that were probed."""
    next_probe_at: Timestamp | None
    """When the runtimes are probed again; null during a probe, if none is planned, and while a runtime works."""
    store: StoreBody
    """The index of tasks."""
    disk: DiskBody
    """The file system of the data directory."""
    draining_since: Timestamp | None
    """When the drain started; null if the server is not draining."""
    occupancy: OccupancyBody | None
    """Capacity and reserved resources; null until they are known."""


class DrainBody(TypedDict):
    """Progress of a drain. `running` tasks continue; `waiting` tasks start once the drain is undone."""

    draining: bool
    """Whether the server is draining."""
    since: Timestamp | None
    """When the drain started; null if the server is not draining."""
    running: int
    """Number of tasks that are still running."""
    waiting: int
    """Number of tasks that start once the drain is undone."""


class HostBody(TypedDict):
    """A host that runs tasks: this machine, or a host of the cluster."""

    name: str
    """Name of the host. In a cluster, this is the engine's name for the host."""
    state: Literal["ready", "not_ready", "idle", "unreachable"]
    """`ready`: this machine can start tasks, or a worker on the host is connected. `not_ready`: this machine cannot
    start tasks, or the engine starts no workers on the host. `idle`: no worker runs on the host, so the server has no
    contact with it. `unreachable`: no worker on the host responds.
    """
    reason: str
    """Human-readable reason for the state; may be empty."""
    cpus: int | None
    """Number of CPUs of the host. For this machine, the number that tasks may reserve; null if unknown."""
    memory_bytes: int | None
    """Memory of the host, in bytes. For this machine, the memory that tasks may reserve; null if unknown."""
    running: int
    """Number of tasks that run on the host."""
    task_ids: list[str]
    """Ids of these tasks, at most 100."""
    last_contact_at: Timestamp | None
    """When a worker on the host last sent a message; null if no worker did, and for this machine."""
    version: str | None
    """Version of Sandbox on the host; null if unknown."""
    draining_since: Timestamp | None
    """When the drain of the host started; null if the host is not drained, and for this machine."""


class HostListBody(TypedDict):
    """The hosts that run tasks, sorted by name."""

    hosts: list[HostBody]
    """This machine, or the hosts of the cluster: at most 1000 on which workers have run, and 1000 others."""


class PrunedTaskBody(TypedDict):
    """A task that was removed or, with `dry_run`, would be removed."""

    id: str
    """Id of the task."""
    name: str
    """Name of the manifest."""
    state: State
    """Final state of the task."""
    finished_at: Timestamp
    """When the task ended."""
    size_bytes: int
    """Disk usage of the task, in bytes."""


class UnexaminedTaskBody(TypedDict):
    """A finished task that cannot be examined."""

    id: str
    """Id of the task."""
    reason: str
    """Why it cannot be examined, and what to do."""


class PrunedBody(TypedDict):
    """The tasks that were removed or, with `dry_run`, would be removed, in the order in which they ended."""

    dry_run: bool
    """Whether nothing was removed."""
    tasks: list[PrunedTaskBody]
    """The removed tasks; with `dry_run`, the tasks that would be removed."""
    total_count: int
    """Number of tasks in `tasks`."""
    total_size_bytes: int
    """Total disk usage of these tasks, in bytes."""
    unexamined: list[UnexaminedTaskBody]
    """Finished tasks that cannot be examined and would be kept. Empty without `dry_run`."""


class SessionBody(TypedDict):
    """Role and name of the session's token."""

    role: Literal["viewer", "operator"]
    """What the token may do: a viewer may only read."""
    name: str
    """Name of the token."""


class FieldErrorBody(TypedDict):
    """One error in a request."""

    location: str
    """Where the value is in the request, such as `body.vm.memory`, `query.sort` or `header.Idempotency-Key`."""
    field: str
    """Path of the field, such as `vm.memory`, or name of the parameter; empty if the error is about the whole body."""
    rule: str
    """Kind of the rule: `required`, `type`, `enum`, `format`, `range`, `unknown_field` or `not_offered`."""
    message: str
    """Human-readable description of what is expected."""
    suggestion: str | None
    """The valid name or value that a misspelled one resembles; null if there is none."""
    line: int | None
    """Line in a YAML manifest, or of an error in the syntax of JSON, from 1."""
    column: int | None
    """Column in a YAML manifest, or of an error in the syntax of JSON, from 1."""


class ExistingTaskBody(TypedDict):
    """The existing task with the same id."""

    id: str
    """Id of the task."""
    state: State
    """Current state."""
    created_at: Timestamp
    """When the task was submitted."""


class ProblemExtensions(TypedDict, total=False):
    """The members of an error response that only some errors have."""

    existing_task: ExistingTaskBody | None
    """The task that already has the id, for `duplicate_task_id`."""
    task_state: State | None
    """State of the task, for `task_already_terminal`, `task_not_ended` and `sandbox_not_found`."""
    requested_cpus: int | None
    """CPUs that the task requests, for `insufficient_resources`."""
    available_cpus: int | None
    """CPUs available for tasks, for `insufficient_resources`."""
    requested_memory: str | None
    """Memory that the task requests, such as `8G`, for `insufficient_resources`."""
    available_memory: str | None
    """Memory available for tasks, for `insufficient_resources`."""
    reasons: list[str] | None
    """Why the server is not ready, for `GET /health/ready`."""


class ProblemBody(ProblemExtensions):
    """An error response: problem details (RFC 9457) with additional members."""

    error: str
    """A stable, machine-readable code. Later versions may add codes."""
    message: str
    """Human-readable cause and remedy."""
    details: list[FieldErrorBody] | None
    """Every error in the request, for `invalid_manifest` and `invalid_parameter`."""
    request_id: str
    """Id of the request in the server's log."""
    type: str
    """`urn:sandbox:error:` and the code."""
    title: str
    """Reason phrase of the status."""
    status: int
    """HTTP status."""
    detail: str
    """The same as `message`, for clients that support only the standard members of RFC 9457."""
    instance: str
    """Path of the request."""
