"""Attempts and times as clients receive them."""

from datetime import UTC, datetime, timedelta, timezone

from doubles.timed_out_task import FORMATTED_TIMESTAMP, TIMESTAMP, timed_out_task
from sandbox.model import events as e
from sandbox.model.display_text import format_timestamp
from sandbox.model.task import Attempt
from sandbox.model.wire.task_conversion import attempt_bodies, task_failure_body


def test_timestamps_are_utc_with_milliseconds():
    assert format_timestamp(TIMESTAMP.astimezone(timezone(timedelta(hours=5, minutes=30)))) == FORMATTED_TIMESTAMP
    assert format_timestamp(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01T00:00:00.000Z"


def test_cancelled_task_has_no_error():
    assert task_failure_body(timed_out_task(cancel=e.CancelRequested())) is None
    assert task_failure_body(timed_out_task(failure=None)) is None
    attempt = Attempt("attempt-1", "bubblewrap", "here")
    failed, cancelled = timed_out_task(attempt=attempt), timed_out_task(attempt=attempt, cancel=e.CancelRequested())
    assert [body["error"] is None for body in attempt_bodies(failed)] == [False]
    assert [body["error"] is None for body in attempt_bodies(cancelled)] == [True]
