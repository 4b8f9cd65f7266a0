"""Attempts and times as clients receive them."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from doubles.manifests import claude
from sandbox.model import events as e
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest, Metadata, Repository
from sandbox.model.task import Attempt, StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.task_conversion import attempt_bodies, format_timestamp, task_failure_body

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, 123456, tzinfo=UTC)
FORMATTED_TIMESTAMP = "2026-01-29T10:10:15.123Z"
MANIFEST = Manifest(
    metadata=Metadata(name="x", labels={"team": "platform"}),
    repository=Repository(url="https://git.example/r", branch="main"),
    agent=claude(prompt="x"),
)
FAILURE = Failure(FailureCode.TIMEOUT, "It took too long.")


def test_timestamps_are_utc_with_milliseconds():
    assert format_timestamp(TIMESTAMP.astimezone(timezone(timedelta(hours=5, minutes=30)))) == FORMATTED_TIMESTAMP
    assert format_timestamp(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01T00:00:00.000Z"


def task(**changes: Any) -> Task:
    history = (StateHistoryEntry(TaskState.PENDING, TIMESTAMP), StateHistoryEntry(TaskState.FAILED, TIMESTAMP))
    fields: dict[str, Any] = {"state": TaskState.FAILED, "state_message": "x", "failure": FAILURE, "exit_code": 143}
    return Task(id="t", manifest=MANIFEST, history=history, last_seq=9, **fields | changes)


def test_cancelled_task_has_no_error():
    assert task_failure_body(task(cancel=e.CancelRequested())) is None
    assert task_failure_body(task(failure=None)) is None
    attempt = Attempt("attempt-1", "bubblewrap", "here")
    failed, cancelled = task(attempt=attempt), task(attempt=attempt, cancel=e.CancelRequested())
    assert [body["error"] is None for body in attempt_bodies(failed)] == [False]
    assert [body["error"] is None for body in attempt_bodies(cancelled)] == [True]
