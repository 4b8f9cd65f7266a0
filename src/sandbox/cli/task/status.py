"""`sandbox task status`"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from sandbox.cli.answer import print_json, print_json_lines
from sandbox.cli.console import output_console
from sandbox.cli.failures import watching
from sandbox.cli.figures import counted, date, money, span
from sandbox.cli.options import Chosen, chosen, common_options
from sandbox.cli.story import STATE_STYLES, tell
from sandbox.cli.visible import visible
from sandbox.model.state import TERMINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.answers import TaskStatus

RECENT_EVENTS = 20
"""How many of the latest events a watch begins with."""


@click.command()
@click.argument("task_id", metavar="TASK_ID")
@click.option("--watch", "-w", "watches", is_flag=True, help="Go on showing what happens until the end.")
@common_options
def status(task_id: str, watches: bool) -> None:
    """Show a task."""
    options = chosen()
    with options.connect() as client:
        if not watches:
            _show(client.status(task_id), options)
            return
        with watching(task_id):
            _watch(client, task_id, options)


def _watch(client: Client, task_id: str, options: Chosen) -> None:
    if options.format == "json":
        print_json_lines(client.events(task_id))
        return
    task = client.status(task_id)
    _show(task, options)
    if task["state"] not in TERMINAL_STATES:
        click.echo()
        tell(client.events(task_id, tail=RECENT_EVENTS), output_console(has_color=options.has_color))


def _show(task: TaskStatus, options: Chosen) -> None:
    if options.format == "json":
        print_json(task)
        return
    from rich.text import Text

    console = output_console(has_color=options.has_color)
    for label, value in _rows(task):
        style = STATE_STYLES.get(task["state"], "") if label == "State" else ""
        console.print(Text.assemble((f"{label:<10}", "dim"), (visible(value), style)), soft_wrap=True)


def _rows(task: TaskStatus) -> Iterator[tuple[str, str]]:
    yield "Task", task["id"]
    yield "Name", task["name"]
    error = task["error"] or {}
    message = task["state_message"] if task["state_message"] != error.get("message") else ""
    yield "State", f"{task['state']}  {message or ''}".rstrip()
    if task["labels"]:
        yield "Labels", ", ".join(f"{key}={value}" for key, value in task["labels"].items())
    yield "Created", date(task["created_at"])
    if task["started_at"]:
        yield "Started", date(task["started_at"])
    if task["finished_at"]:
        took = span(task["started_at"], task["finished_at"])
        yield "Finished", date(task["finished_at"]) + (f"  after {took}" if took else "")
    if task["vm"]:
        yield "Sandbox", "  ".join(str(task["vm"][key]) for key in ("runtime", "tier", "image") if task["vm"].get(key))
    yield from _work(task)


def _work(task: TaskStatus) -> Iterator[tuple[str, str]]:
    progress = task["progress"]
    done = [(progress["turns"], "turn"), (progress["tool_calls"], "tool call")]
    told = [counted(number, noun) for number, noun in done if number]
    if progress["current_tool"]:
        told.append(f"{progress['current_tool']} now")
    if told:
        yield "Work", " · ".join(told)
    if progress["input_tokens"] or progress["output_tokens"]:
        tokens = f"{progress['input_tokens']:,} tokens in, {progress['output_tokens']:,} out"
        yield "Model", tokens + (f" · {money(progress['cost_usd'])}" if progress["cost_usd"] else "")
    if task["exit_code"] is not None:
        yield "Exit code", str(task["exit_code"])
    if task["error"]:
        yield "Error", f"{task['error'].get('code')}: {task['error'].get('message')}"
