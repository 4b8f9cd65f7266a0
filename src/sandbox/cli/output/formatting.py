"""Formats times, counts and outcomes of tasks for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sandbox.cli.output.text import escape_name, escape_text
from sandbox.model.formatting import format_duration, format_state

if TYPE_CHECKING:
    from sandbox.client.response_types import Progress


def parse_timestamp(timestamp: str | None) -> datetime | None:
    """Convert a time from the API (RFC 3339) to local time; return None for an empty or invalid one."""
    try:
        at = datetime.fromisoformat(timestamp) if timestamp else None
        return at and (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone()
    except (ValueError, OverflowError):
        return None


def format_time(timestamp: str | None) -> str:
    """Format the local time of day: `12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%H:%M:%S") if at else "--:--:--"


def format_date(timestamp: str | None) -> str:
    """Format the local date: `2026-01-29`; empty if there is no time."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d") if at else ""


def format_datetime(timestamp: str | None) -> str:
    """Format local date and time: `2026-01-29 12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def format_elapsed(first: str | None, last: str | None) -> str:
    """Format the time between two timestamps: `2 min 5 s`; empty unless both are given."""
    begin, end = parse_timestamp(first), parse_timestamp(last)
    return format_duration((end - begin).total_seconds()) if begin and end else ""


def format_age(timestamp: str | None, now: datetime) -> str:
    """Format an age in one unit: `42 s`, `12 min`, `3 h`, `4 d`."""
    at = parse_timestamp(timestamp)
    seconds = max(int((now - at).total_seconds()), 0) if at else 0
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s" if at else "-"


def state_text(task: Mapping[str, Any], *, is_terminal: bool) -> str:
    """Return a task's state; on a terminal, `failed, preserved` or `failed, released`, as in the dashboard.

    Without a terminal, the state is unchanged, because scripts read it. Older servers do not send `sandbox_kept` in
    lists.
    """
    state = str(task["state"])
    return format_state(state, is_preserved=task.get("sandbox_kept") is not False) if is_terminal else state


def pluralize(number: int, noun: str) -> str:
    """Format a count with its noun: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def current_activity(progress: Progress) -> str:
    """Return the running tool and the subject of its call; empty if none is running.

    Older servers do not send subjects.
    """
    parts = (progress["current_tool"], progress.get("current_subject"))
    return escape_name(" ".join(part for part in parts if part)) if parts[0] else ""


def outcome_summary(status: Mapping[str, Any], *, has_reason: bool = True) -> str:
    """Describe how a task ended and what to do next.

    has_reason: whether to include the reason; false if it has already been printed.
    """
    task_id, error = escape_text(str(status.get("id") or status.get("task_id"))), status.get("error")
    lines = [f"Task {task_id} {_OUTCOMES.get(str(status.get('state')), 'ended')}."]
    if isinstance(error, Mapping):
        if has_reason:
            reason = escape_text(f"{error.get('message')} ({error.get('code')})")
            lines = [f"{lines[0].removesuffix('.')}: {reason}"]
        lines.append(f"  See what happened: sandbox task logs {task_id}")
    if status.get("sandbox_kept"):
        lines += [
            "  Its sandbox is preserved.",
            f"  Open a shell:      sandbox task shell {task_id}",
            f"  Remove it:         sandbox task release {task_id}",
        ]
    return "\n".join(lines)


_OUTCOMES = {
    "completed": "completed",
    "cancelled": "was cancelled",
    "failed": "failed",
    "failed_preserved": "failed",
}
