"""Formats times, counts, states, names, ids and changes of tasks in human-readable form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from sandbox.cli.output.console import escape_name
from sandbox.model.display_text import format_duration, format_state
from sandbox.model.task_state import TaskState

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


def task_duration(task: Mapping[str, Any]) -> str:
    """Format how long the agent worked; empty if it never started. Older servers send no duration."""
    seconds = task.get("duration_seconds")
    return "" if seconds is None else format_duration(seconds)


def format_age(timestamp: str | None, now: datetime) -> str:
    """Format an age in one unit: `42 s`, `12 min`, `3 h`, `4 d`."""
    at = parse_timestamp(timestamp)
    seconds = max(int((now - at).total_seconds()), 0) if at else 0
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s" if at else "-"


def state_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's state; on a terminal, `failed, preserved` or `failed, released`, as in the dashboard.

    Without a terminal, the state is unchanged, because scripts read it. Older servers do not send `sandbox_kept` in
    lists.
    """
    state = str(task["state"])
    return format_state(state, is_preserved=task.get("sandbox_kept") is not False) if on_terminal else state


def name_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's name. On a terminal, ↳ marks a continuation and ↻ a rerun, as in the dashboard.

    The beginning of the prompt follows the mark, because such tasks often share their name. It comes before the name,
    because a narrow window truncates the end. Older servers send neither the relations nor the prompt.
    """
    mark = "↻" if task.get("rerun_of") is not None else "↳" if task.get("parent") is not None else ""
    if not on_terminal or not mark:
        return str(task["name"])
    return f"{mark} {' · '.join(filter(None, (task.get('prompt_beginning'), str(task['name']))))}"


_CLAUSE_END = re.compile(r"[;.](?=\s)|[;.]$")
_CLONE_PREFIX = re.compile(r"^Cannot clone \S+: (?=.)", re.DOTALL)


def failure_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return the error of a failed task as text for a table.

    On a terminal, the text is the cause, without the repository's URL and without the remedy. Otherwise, the text is
    for scripts: the error code, and whether the sandbox was released, which the state does not show.
    """
    error = task["error"]
    if not error:
        return ""
    if on_terminal:
        message = _CLONE_PREFIX.sub("Cannot clone: ", error["message"])
        return message[: end.start()] if (end := _CLAUSE_END.search(message)) else message
    is_released = task["state"] == TaskState.FAILED_PRESERVED and task.get("sandbox_kept") is False
    return f"{error['code']}{' (released)' if is_released else ''}"


def pluralize(number: int, noun: str) -> str:
    """Format a count with its noun: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def current_activity(progress: Progress) -> str:
    """Return the running tool and the subject of its call, or what the agent waits for; empty if there is neither.

    Older servers do not send subjects.
    """
    parts = (progress["current_tool"], progress.get("current_subject"))
    return escape_name(" ".join(part for part in parts if part))


GENERATED_ID_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SHORT_ID_CHARACTERS = 8


def shorten_ids(ids: Iterable[str]) -> dict[str, str]:
    """Map each generated id to a prefix that no other id has, and each chosen id to itself."""
    ordered = sorted(set(ids))
    shared = [
        sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False))) for pair in pairwise(ordered)
    ]
    lengths = map(max, [0, *shared], [*shared, 0])
    return {
        task_id: task_id[: max(length + 1, SHORT_ID_CHARACTERS)] if GENERATED_ID_PATTERN.fullmatch(task_id) else task_id
        for task_id, length in zip(ordered, lengths, strict=False)
    }


def format_changes(task: Mapping[str, Any]) -> str:
    """Format the number of changed lines: `+16 −4`; empty if the size of the patch is unknown or no file changed."""
    diff = task.get("diff")
    return f"+{diff['additions']:,} −{diff['deletions']:,}" if diff and diff["files"] else ""


def changes_summary(task: Mapping[str, Any], chain_changes: str = "") -> str:
    """Format the size of a task's patch: `+16 −4 in 2 files`; empty if it is unknown or no file changed.

    chain_changes: the same for the task and the earlier tasks of its chain; empty if there are none.
    """
    diff, changes = task.get("diff"), format_changes(task)
    if not diff or not changes:
        return f"none (chain: {chain_changes})" if diff and chain_changes else ""
    return f"{changes} in {pluralize(diff['files'], 'file')}" + (f" (chain: {chain_changes})" if chain_changes else "")


def task_prompt(task: Mapping[str, Any]) -> str:
    """Return the prompt in a task's manifest; empty if there is none."""
    sections = [section for section in (task.get("definition") or {}).values() if isinstance(section, dict)]
    return next((section["prompt"] for section in sections if isinstance(section.get("prompt"), str)), "")
