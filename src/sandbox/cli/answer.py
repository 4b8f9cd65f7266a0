"""Printing one answer of the API: as JSON for programs, else as a command sees fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from sandbox.cli.visible import visible, visible_json


def print_json(answer: Mapping[str, Any]) -> None:
    """The API's answer as it is."""
    click.echo(visible_json(answer))


def print_json_lines(frames: Iterable[Mapping[str, Any]]) -> str | None:
    """One event a line, as they come; give the final state, None if they stop before it."""
    state = None
    for frame in frames:
        click.echo(json.dumps(frame, ensure_ascii=sys.stdout.isatty()))
        if frame.get("type") == "end":
            state = str(frame.get("state"))
    return state


def ending(status: Mapping[str, Any], *, has_reason: bool = True) -> str:
    """One sentence for how a task ended, with its reason unless that was told before, and what to do with the rest."""
    error = status.get("error")
    reason = f": {error.get('message')} ({error.get('code')})" if has_reason and isinstance(error, Mapping) else "."
    task_id = visible(str(status.get("id") or status.get("task_id")))
    sentence = f"Task {task_id} {_ENDED.get(str(status.get('state')), 'ended')}{visible(reason)}"
    is_preserved = status.get("state") == "failed_preserved"
    kept = f"\n  Its sandbox was preserved. Remove it: sandbox task release {task_id}"
    return sentence + kept if is_preserved else sentence


_ENDED = {
    "completed": "completed",
    "cancelled": "was cancelled",
    "failed": "failed",
    "failed_preserved": "failed",
}
