"""What the doors ask of the server: tasks as their users know them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from sandbox.interfaces.placement import TerminalOrder
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.store import TaskPage, TaskQuery
from sandbox.interfaces.terminals import TerminalConnection
from sandbox.model.errors import SandboxError
from sandbox.model.events import Artifact, Idempotency
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import WireEvent


@dataclass(frozen=True, slots=True)
class Retention:
    """Finished tasks go, oldest end first, that any of these is too small for; None: it bounds nothing.

    older_than_seconds: since a task's end. keep: how many there may be. max_bytes: on disk, all of them together.
    """

    older_than_seconds: float | None = None
    keep: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PrunedTask:
    """A task that is gone, or would be. size_bytes: what it took on disk."""

    id: str
    state: TaskState
    finished_at: datetime
    size_bytes: int


class TaskNotFoundError(SandboxError):
    """No task has this id."""

    code = "task_not_found"

    def __init__(self, task_id: str) -> None:
        super().__init__(f"There is no task {task_id!r}; list the tasks to see which there are.")
        self.task_id = task_id


class TaskTerminalError(SandboxError):
    """The task is in its final state, so nothing about it can be changed."""

    code = "task_already_terminal"

    def __init__(self, task: Task) -> None:
        super().__init__(f"Task {task.id} is {task.state} already; nothing is left to cancel.")
        self.task = task


class InsufficientResourcesError(SandboxError):
    """The task alone asks for more than this machine may ever promise."""

    code = "insufficient_resources"

    def __init__(
        self,
        shortages: Sequence[str],
        *,
        requested_cpus: int,
        available_cpus: int,
        requested_memory_bytes: int,
        available_memory_bytes: int,
    ) -> None:
        """lacking: what there is too little of, with both figures, for people."""
        super().__init__(
            f"The task asks for {' and '.join(shortages)}: more than this machine can give. "
            "Lower vm.cpus, vm.memory or vm.disk, or raise the server's capacity settings."
        )
        self.requested_cpus = requested_cpus
        self.available_cpus = available_cpus
        self.requested_memory_bytes = requested_memory_bytes
        self.available_memory_bytes = available_memory_bytes


class UnavailableError(SandboxError):
    """The server cannot take tasks at the moment."""

    code = "service_unavailable"
    retryable = True

    def __init__(self, message: str, *, retry_after_seconds: int | None = None) -> None:
        """retry_after_seconds: when to ask again; None where that is not known."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ArtifactNotFoundError(SandboxError):
    """The task has no artifact of this name or path."""

    code = "artifact_not_found"

    def __init__(self, task_id: str, name: str) -> None:
        super().__init__(f"Task {task_id} has no artifact {name!r}; list its artifacts to see which there are.")
        self.name = name


class IdempotencyKeyReusedError(SandboxError):
    """The key came before, with another body."""

    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key came with another body before; use a new key for a new task.")


class SandboxNotPreservedError(SandboxError):
    """No sandbox of the task is kept, or no longer."""

    code = "not_found"

    def __init__(self, task: Task) -> None:
        why = "only failure_action: preserve keeps one, for a while"
        if task.state is TaskState.FAILED_PRESERVED:
            why = "it was released, or its time is over"
        super().__init__(f"No sandbox of task {task.id} is kept; {why}.")


@dataclass(frozen=True, slots=True)
class Submission:
    """A task that was taken, as it was then; `is_replayed` when the same submission came before."""

    task: Task
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A wish to cancel that is durable. `task` is as it was before the wish, `message` for people."""

    task: Task
    at: datetime
    message: str


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact, where its bytes are on the host, and when they were stored."""

    artifact: Artifact
    file: Path
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How much may be promised to unfinished tasks, how much is, and how many wait for more."""

    cpus: int
    cpus_promised: int
    memory_bytes: int
    memory_promised_bytes: int
    disk_bytes: int
    disk_promised_bytes: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Health:
    """How the server is. `reasons` say why it is not ready to take and run tasks; empty when `ready`.

    next_probe_at: when the runtimes are probed again; None while they are, and where no further probe is planned.
    retry_after_seconds: when to ask again, where no runtime works.
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
class DrainStatus:
    """How far a drain is. since: None when the server is not being drained; running: tasks under way."""

    since: datetime | None
    running: int
    waiting: int


class Tasks(Protocol):
    """The server's tasks. Every method about one task may raise TaskNotFoundError."""

    async def find_submission(self, idempotency: Idempotency) -> Submission | None:
        """What came with this key and body within the last 24 h. Raises IdempotencyKeyReusedError, UnavailableError."""
        ...

    async def submit(self, manifest: Manifest, idempotency: Idempotency | None = None) -> Submission:
        """Take a task; it is durable on return. The same key and body within 24 h give the same task again.

        Raises IdempotencyKeyReusedError, DuplicateTaskError, InsufficientResourcesError, UnavailableError.
        """
        ...

    async def check_admission(self, manifest: Manifest) -> None:
        """Whether `submit` would take this now; raises what it would, and changes nothing."""
        ...

    async def status(self, task_id: str) -> Task:
        """The task as it is now."""
        ...

    async def query(self, query: TaskQuery) -> TaskPage:
        """A page of tasks."""
        ...

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        """Wish the task's end; the wish is durable on return. Raises TaskTerminalError."""
        ...

    async def release(self, task_id: str) -> None:
        """Remove the files of a preserved sandbox. Raises SandboxNotPreservedError when there is none (any more)."""
        ...

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> Sequence[PrunedTask]:
        """Remove finished tasks that are kept no longer, by the server's own bounds for None; gives them.

        dry_run: only say which. Raises UnavailableError.
        """
        ...

    async def has_preserved_sandbox(self, task: Task) -> bool:
        """Whether there is a preserved sandbox of the task that `release` would remove."""
        ...

    async def open_terminal(self, task_id: str, order: TerminalOrder) -> TerminalConnection:
        """A terminal in the task's sandbox. Raises TerminalRefusedError, UnavailableError."""
        ...

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        """The task once it is terminal, or as it is when the time is over."""
        ...

    def replay(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """What the journal holds now past `after`; the `end` frame only of a finished task."""
        ...

    def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        """The frames past `after`, then live, the last one `end`.

        None: from now on, preceded by the present state.
        """
        ...

    def follow_all(self) -> AsyncIterator[WireEvent]:
        """Live frames of all tasks, from the first step of the iterator on (before it waits for anything)."""
        ...

    async def artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        """What is stored of the task."""
        ...

    async def artifact(self, task_id: str, name: str) -> StoredArtifact:
        """One artifact by its name, else by its path. Raises ArtifactNotFoundError."""
        ...

    async def drain(self) -> DrainStatus:
        """Begin no task and take none until it is undone, by servers to come too. Raises UnavailableError."""
        ...

    async def undo_drain(self) -> DrainStatus:
        """Take and begin tasks again. Raises UnavailableError."""
        ...

    async def drain_status(self) -> DrainStatus:
        """How far it is."""
        ...

    async def health(self) -> Health:
        """How the server is."""
        ...
