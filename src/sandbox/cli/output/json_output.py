"""Output of API responses as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from sandbox.cli.output.terminal_text import escape_json


def print_json(value: Mapping[str, Any]) -> None:
    """Print an API response as JSON."""
    click.echo(escape_json(value))


def print_json_lines(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Print events as they arrive, one per line; return the final state, or None if the events end without one."""
    state = None
    for event in events:
        click.echo(json.dumps(event, ensure_ascii=sys.stdout.isatty()))
        if event.get("type") == "end":
            state = str(event.get("state"))
    return state
