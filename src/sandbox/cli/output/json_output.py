"""Output of API responses as JSON, and the summary of a task's outcome."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from sandbox.cli.output.text import escape_json, escape_text


def print_json(value: Mapping[str, Any]) -> None:
    """Print an API response as JSON."""
    click.echo(escape_json(value))


def print_json_lines(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Print events as they arrive, one per line; return the final state, or None if the events stop before it."""
    state = None
    for event in events:
        click.echo(json.dumps(event, ensure_ascii=sys.stdout.isatty()))
        if event.get("type") == "end":
            state = str(event.get("state"))
    return state


def outcome_summary(status: Mapping[str, Any], *, has_reason: bool = True) -> str:
    """Describe how a task ended and what to do next. has_reason: include the reason, unless it was printed before."""
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
