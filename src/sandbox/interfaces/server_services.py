"""The services that the server provides to its API and dashboard."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.placement import HostStatus
from sandbox.interfaces.runner import OpenTerminal, TerminalConnection
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.store import ChangePosition, TaskPage, TaskQuery
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError
from sandbox.model.events import Idempotency, Parent
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_generated_id_prefix
from sandbox.model.task_state import TaskState
from sandbox.model.wire.event_conversion import WireEvent


@dataclass(frozen=True, slots=True)
class Retention:
    """Retention limits: the oldest finished tasks beyond any limit are removed. None means no limit.

    older_than_seconds: maximum time since a task's end.
    keep: maximum number of tasks.
    max_bytes: maximum total disk usage of all finished tasks.
    """

    older_than_seconds: float | None = None
    keep: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PrunedTask:
    """A task that was removed, or would be removed (dry run). size_bytes: its disk usage."""

    id: str
    name: str
    state: TaskState
    finished_at: datetime
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The tasks that were removed, or would be removed (dry run), oldest first.

    unexamined: why finished tasks could not be examined and are kept, keyed by task id; each reason names the remedy.
    """

    tasks: Sequence[PrunedTask]
    unexamined: Mapping[str, str]


def _advice(task_id: str) -> str:
    """Return the advice to give the full id if this is the beginning of a generated id; otherwise empty.

    Only commands and the dashboard accept the beginning of an id.
    """
    return " Give the full id." if is_generated_id_prefix(task_id) else ""


class TaskNotFoundError(SandboxError):
    """No task has this id."""

    code = "task_not_found"

    def __init__(self, task_id: str) -> None:
        super().__init__(f"There is no task {task_id!r}; list the tasks to see their ids.{_advice(task_id)}")
        self.task_id = task_id


class TaskEndedError(SandboxError):
    """The task is in its final state and cannot be changed."""

    code = "task_already_terminal"

    def __init__(self, task: Task) -> None:
        super().__init__(f"Task {task.id} is already {task.state} and cannot be cancelled.")
        self.task = task


class InsufficientResourcesError(SandboxError):
    """The task requests more than the capacity of this host, or of each host of a cluster."""

    code = "insufficient_resources"

    def __init__(
        self,
        shortages: Sequence[str],
        *,
        requested_cpus: int,
        available_cpus: int,
        requested_memory_bytes: int,
        available_memory_bytes: int,
        is_cluster: bool = False,
    ) -> None:
        """Create the error. shortages: the missing resources with requested and available amounts, human-readable."""
        requested, remedy = " and ".join(shortages), "Lower vm.cpus, vm.memory or vm.disk"
        super().__init__(
            f"The task requests {requested}, more than any host of the cluster has. {remedy}."
            if is_cluster
            else f"The task requests {requested}, more than this machine has. {remedy}, or raise the server's capacity "
            "settings."
        )
        self.requested_cpus = requested_cpus
        self.available_cpus = available_cpus
        self.requested_memory_bytes = requested_memory_bytes
        self.available_memory_bytes = available_memory_bytes


class UnavailableError(SandboxError):
    """The server cannot accept tasks at the moment."""

    code = "service_unavailable"
    retryable = True

    def __init__(self, message: str, *, retry_after_seconds: int | None = None) -> None:
        """Create the error. retry_after_seconds: when to retry; None if unknown."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ArtifactNotFoundError(SandboxError):
    """The task has no artifact with this name or path."""

    code = "artifact_not_found"

    def __init__(self, task_id: str, name: str) -> None:
        super().__init__(f"Task {task_id} has no artifact {name!r}; list its artifacts to see their names.")
        self.name = name


class IdempotencyKeyReusedError(SandboxError):
    """The idempotency key was used before with a different body."""

    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with a different body; use a new key for a new task.")


class SandboxNotPreservedError(SandboxError):
    """The task has no preserved sandbox, or its preserved sandbox was removed."""

    code = "sandbox_not_found"

    def __init__(self, task: Task) -> None:
        was_preserved = task.state is TaskState.FAILED_PRESERVED
        rule = f"it is {task.state}, and only failed tasks with lifecycle.failure_action: preserve keep their sandbox"
        reason = "it was released, or has expired" if was_preserved else rule
        super().__init__(f"Task {task.id} has no preserved sandbox; {reason}.")
        self.task = task


class TaskNotEndedError(SandboxError):
    """The task has not ended, so it cannot be continued or deleted."""

    code = "task_not_ended"

    def __init__(self, task: Task, action: str) -> None:
        """Create the error. action: what the caller wants to do with the task, such as `continue`."""
        super().__init__(f"Task {task.id} is {task.state}; wait for it to end or cancel it, then {action} it.")
        self.task = task


class TaskNotContinuableError(SandboxError):
    """The task has ended, but no other task can start from its work.

    can_rerun: whether the remedy is to run the task again.
    """

    code = "task_not_continuable"

    def __init__(self, task_id: str, reason: str, remedy: str | None = None) -> None:
        """Create the error. remedy: what to do; by default, to run the task again."""
        super().__init__(f"Task {task_id} cannot be continued: {reason}. {remedy or 'Run it again.'}")
        self.task_id, self.can_rerun = task_id, remedy is None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a new task inherits from an earlier one.

    sources: the stored files, keyed by their names in the new task; `parent.files` describes each file.
    conversation: the content of `parent.conversation`, if that file has no source.
    """

    parent: Parent
    sources: Mapping[str, Path]
    conversation: bytes = b""


@dataclass(frozen=True, slots=True)
class DerivedTaskPlan:
    """The starting point of a new task: the manifest of an earlier one, and what the new task inherits from it."""

    manifest: Manifest
    inheritance: Inheritance | None


@dataclass(frozen=True, slots=True)
class Submission:
    """An accepted task, in its state at the time of acceptance.

    is_replayed: the same submission had been accepted before.
    """

    task: Task
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A durable cancel request.

    task_before: the task as it was before the request.
    state: the current state.
    requested_at: when the first request for this task was recorded.
    message: human-readable.
    """

    task_before: Task
    state: TaskState
    requested_at: datetime
    message: str


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact, the path of its bytes on the host, and when they were stored."""

    artifact: Artifact
    file: Path
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Capacity for unfinished tasks, reserved capacity, and the number of waiting tasks."""

    cpus: int
    cpus_reserved: int
    memory_bytes: int
    memory_reserved_bytes: int
    disk_bytes: int
    disk_reserved_bytes: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Health:
    """Health of the server. `reasons` say why it cannot accept and run tasks; empty if `is_ready`.

    next_probe_at: the next probe of the runtimes; None during a probe, or if no other probe is planned.
    retry_after_seconds: when to retry if no runtime works.
    """

    version: str
    uptime_seconds: float
    tasks_by_state: Mapping[TaskState, int]
    runtimes: Sequence[RuntimeProbe]
    is_store_ok: bool
    disk_free_bytes: int
    disk_total_bytes: int
    is_ready: bool
    reasons: Sequence[str] = ()
    draining_since: datetime | None = None
    occupancy: Occupancy | None = None
    next_probe_at: datetime | None = None
    retry_after_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class HostLoad:
    """A snapshot of a host's load. Tick counts are totals of all CPUs since boot."""

    cpu_busy_ticks: int
    cpu_total_ticks: int
    memory_available_bytes: int
    memory_total_bytes: int


MeasureHostLoad = Callable[[], HostLoad]
"""Measures this host. Raises OSError, ValueError."""


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The load of the server and its host at one moment.

    cpu_percent: usage of all CPUs since the previous sample; None for the first sample.
    running: unfinished tasks that are not waiting.
    """

    at: datetime
    cpu_percent: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    cpus: int
    cpus_reserved: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """Progress of a drain. since: None if there is no drain. running: unfinished tasks that are not waiting."""

    since: datetime | None
    running: int
    waiting: int


class Submissions(Protocol):
    """Accepts tasks."""

    async def find_submission(self, idempotency: Idempotency) -> Submission | None:
        """Return the submission of the last 24 h with this key and body, or None.

        Raises IdempotencyKeyReusedError, UnavailableError.
        """
        ...

    async def submit(
        self,
        manifest: Manifest,
        idempotency: Idempotency | None = None,
        inheritance: Inheritance | None = None,
        rerun_of: str | None = None,
    ) -> Submission:
        """Accept a task; it is durable on return. The same key and body within 24 h return the same task.

        inheritance: what to copy from an earlier task. Afterwards, the new task does not depend on that task.
        rerun_of: id of the task that the new one runs again.

        Raises IdempotencyKeyReusedError, DuplicateTaskError, InsufficientResourcesError, UnavailableError.
        """
        ...

    async def check_acceptance(self, manifest: Manifest) -> None:
        """Check whether `submit` would accept the task now. Raises the same errors as `submit`, and changes nothing."""
        ...


class DerivedTaskPlanner(Protocol):
    """Plans tasks that start from earlier ones, and changes nothing. Raises TaskNotFoundError."""

    async def plan_rerun(self, task_id: str) -> DerivedTaskPlan:
        """Return the starting point of this task, which may be in any state."""
        ...

    async def plan_continuation(self, task_id: str) -> DerivedTaskPlan:
        """Return the result of this task as a starting point. Raises TaskNotEndedError, TaskNotContinuableError."""
        ...

    async def continuation_refusal(self, task: Task) -> str | None:
        """Return why `plan_continuation` refuses this finished task; None if it accepts the task."""
        ...


class TaskQueries(Protocol):
    """The current tasks. Methods about one task raise TaskNotFoundError."""

    async def status(self, task_id: str) -> Task:
        """Return the current task."""
        ...

    async def query(self, query: TaskQuery) -> TaskPage:
        """Return a page of tasks."""
        ...

    async def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        """Return the beginning of each task's prompt, keyed by task id. Pages of tasks do not include prompts."""
        ...

    async def chain(self, task: Task) -> Sequence[Task]:
        """Return a task's chain, at most CHAIN_TOTALS_TASKS_MAX tasks.

        The tasks that this task continues, oldest first, are followed by the task itself, and by the tasks that
        continue it, directly or indirectly. Removed tasks are missing, and so are tasks that only a removed task
        links to. All tasks except the given one lack their large fields, because all of them are in memory together.
        """
        ...

    def job_status(self, task_id: str) -> JobStatus | None:
        """Return the status of the task's job in the engine, or None if there is no such job."""
        ...

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        """Return the task once it has ended, or in its current state after the timeout."""
        ...


class TaskCancellation(Protocol):
    """Cancels tasks. Raises TaskNotFoundError."""

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        """Request the task's cancellation; the request is durable on return. Raises TaskEndedError."""
        ...


class TaskDeletion(Protocol):
    """Deletes finished tasks. Raises TaskNotFoundError."""

    async def delete(self, task_id: str) -> str:
        """Delete a finished task with all its data, including a preserved sandbox. Return a human-readable result.

        On return, the deletion is durable. Raises TaskNotEndedError, UnavailableError.
        """
        ...


@dataclass(frozen=True, slots=True)
class StateChange:
    """A task changed its state.

    position: the position after the task's latest change. events: the events that describe the current state.
    """

    position: ChangePosition
    events: Sequence[WireEvent]


class TaskEvents(Protocol):
    """Events of tasks. Iterators about one task raise TaskNotFoundError."""

    def recorded_events(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """Yield the events that the journal now contains after `after`, then `end` if the task has finished."""
        ...

    def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        """Yield the events after `after`, then live ones; the last one is `end`.

        With `after=None`, yield only live events, preceded by the current state.
        """
        ...

    def follow_states(
        self, after: ChangePosition | None, *, is_live: bool = True
    ) -> AsyncIterator[StateChange | ChangePosition]:
        """Yield the position of the stream, then each task that changed its state after `after`, then live changes.

        With `after=None`, yield only live changes. If `is_live` is false, yield no live changes. A task that
        changes its state several times before the stream reaches it is yielded once. If `after` belongs to another
        index, all tasks are yielded. Raises StoreError.
        """
        ...

    def follow_all(self) -> AsyncIterator[WireEvent]:
        """Yield live events of all tasks. The subscription starts when the first event is requested."""
        ...


class TaskArtifacts(Protocol):
    """Stored files of tasks. Every method raises TaskNotFoundError."""

    async def list_artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        """Return the stored artifacts of the task."""
        ...

    async def find_artifact(self, task_id: str, name: str) -> StoredArtifact:
        """Return the artifact with this name, otherwise the one with this path. Raises ArtifactNotFoundError."""
        ...


class TaskSandboxes(Protocol):
    """The sandboxes of running tasks, and the preserved sandboxes of failed tasks."""

    async def open_terminal(self, task_id: str, request: OpenTerminal) -> TerminalConnection:
        """Open a terminal in the task's sandbox. Raises TerminalRefusedError, UnavailableError."""
        ...

    async def has_preserved_sandbox(self, task: Task) -> bool:
        """Return whether the task has a preserved sandbox that `release` would remove."""
        ...

    async def preserved_sandboxes(self, tasks: Sequence[Task]) -> Set[str]:
        """Return the ids of the tasks that have a preserved sandbox."""
        ...

    async def release(self, task_id: str) -> None:
        """Remove the files of a preserved sandbox. Raises SandboxNotPreservedError if none exists."""
        ...


class Administration(Protocol):
    """Retention, drain and health of the server."""

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> PruneResult:
        """Remove the finished tasks that exceed `retention` (None: the server's own limits). Return the removed tasks.

        dry_run: only return what would be removed. Raises UnavailableError; without `dry_run`, this includes tasks that
        could not be examined.
        """
        ...

    async def drain(self) -> DrainStatus:
        """Stop accepting and starting tasks until `undo_drain`, even across restarts. Raises UnavailableError."""
        ...

    async def undo_drain(self) -> DrainStatus:
        """Accept and start tasks again. Raises UnavailableError."""
        ...

    async def drain_status(self) -> DrainStatus:
        """Return the progress of the drain."""
        ...

    async def health(self) -> Health:
        """Return the health report."""
        ...


@dataclass(frozen=True, slots=True)
class HostWithTasks:
    """A host, and the tasks with an attempt that is running there, sorted by id.

    Preserved sandboxes of failed tasks are not included.
    """

    status: HostStatus
    task_ids: Sequence[str]


class Hosts(Protocol):
    """The hosts that run tasks."""

    @property
    def has_cluster(self) -> bool:
        """Whether new tasks run on the hosts of a cluster."""
        ...

    def list_hosts(self) -> Sequence[HostWithTasks]:
        """Return the hosts, sorted by name: this machine, or the known hosts of the cluster.

        With a cluster, this machine is included only while it runs tasks.
        """
        ...

    async def drain_host(self, name: str) -> HostWithTasks:
        """Start no new tasks on a cluster host until `undo_host_drain`, even across restarts.

        Idempotent. Tasks that run there continue. Raises HostNotFoundError, UnavailableError.
        """
        ...

    async def undo_host_drain(self, name: str) -> HostWithTasks:
        """Start tasks on a host of the cluster again. Idempotent. Raises HostNotFoundError, UnavailableError."""
        ...


class ServerLoad(Protocol):
    """The load of the server and its host over time."""

    def load_samples(self) -> Sequence[LoadSample]:
        """Return the latest samples since the start of the server, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class TaskServices:
    """All services that the server provides to its API and dashboard."""

    submissions: Submissions
    tasks: TaskQueries
    cancellation: TaskCancellation
    deletion: TaskDeletion
    events: TaskEvents
    artifacts: TaskArtifacts
    sandboxes: TaskSandboxes
    administration: Administration
    derived_tasks: DerivedTaskPlanner
    load: ServerLoad
    hosts: Hosts
