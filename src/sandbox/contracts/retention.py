"""How long finished tasks are kept, and what became of those that were not."""

from dataclasses import dataclass
from datetime import datetime

from sandbox.model.state import TaskState


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
