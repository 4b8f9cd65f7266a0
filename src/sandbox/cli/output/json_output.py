"""Printing one answer of the API: as JSON for programs, else as a command sees fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from sandbox.cli.output.text import escape_json, escape_text


def print_json(answer: Mapping[str, Any]) -> None:
    """The API's answer as it is."""
    click.echo(escape_json(answer))


def print_json_lines(frames: Iterable[Mapping[str, Any]]) -> str | None:
    """One event a line, as they come; give the final state, None if they stop before it."""
    state = None
    for frame in frames:
        click.echo(json.dumps(frame, ensure_ascii=sys.stdout.isatty()))
        if frame.get("type") == "end":
            state = str(frame.get("state"))
    return state


def outcome_summary(status: Mapping[str, Any], *, has_reason: bool = True) -> str:
    """How a task ended, with its reason unless that was told before, and what to do with the rest."""
    task_id, error = escape_text(str(status.get("id") or status.get("task_id"))), status.get("error")
    lines = [f"Task {task_id} {_OUTCOMES.get(str(status.get('state')), 'ended')}."]
    if isinstance(error, Mapping):
        if has_reason:
            reason = escape_text(f"{error.get('message')} ({error.get('code')})")
            lines = [f"{lines[0].removesuffix('.')}: {reason}"]
        lines.append(f"  See what happened: sandbox task logs {task_id}")
    if status.get("sandbox_kept"):
        lines += [
            "  Its sandbox is kept.",
            f"  Look into it:      sandbox task shell {task_id}",
            f"  Remove it:         sandbox task release {task_id}",
        ]
    return "\n".join(lines)


_OUTCOMES = {
    "completed": "completed",
    "cancelled": "was cancelled",
    "failed": "failed",
    "failed_preserved": "failed",
}
