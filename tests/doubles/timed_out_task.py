"""A task that failed because of its timeout."""

from datetime import UTC, datetime
from typing import Any

from doubles.manifests import claude
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest, Metadata, Repository
from sandbox.model.task import StateHistoryEntry, Task
from sandbox.model.task_state import TaskState

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
FORMATTED_TIMESTAMP = "2026-01-29T10:10:15.123Z"
MANIFEST = Manifest(
    metadata=Metadata(name="x", labels={"team": "platform"}),
    repository=Repository(url="https://git.example/r", branch="main"),
    agent=claude(prompt="x"),
)
FAILURE = Failure(FailureCode.TIMEOUT, "It took too long.")


def timed_out_task(**changes: Any) -> Task:
    """Return a task with the id `t` that failed with exit code 143, with these changes."""
    history = (StateHistoryEntry(TaskState.PENDING, TIMESTAMP), StateHistoryEntry(TaskState.FAILED, TIMESTAMP))
    fields: dict[str, Any] = {"state": TaskState.FAILED, "state_message": "x", "failure": FAILURE, "exit_code": 143}
    return Task(id="t", manifest=MANIFEST, history=history, last_seq=9, **fields | changes)
