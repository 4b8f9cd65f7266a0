"""The `sandbox task status` command."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import hint_if_interrupted
from sandbox.cli.options import CliOptions, common_options, current_options
from sandbox.cli.output.console import (
    escape_name,
    print_json,
    print_json_lines,
    stdout_console,
    terminal_width,
    wrap_text,
)
from sandbox.cli.output.event_printer import STATE_STYLES, STATES_ONLY, PendingReasonPoller, print_events
from sandbox.cli.output.formatting import (
    changes_summary,
    current_activity,
    format_datetime,
    format_elapsed,
    pluralize,
    state_text,
    task_duration,
    task_prompt,
)
from sandbox.cli.output.task_outcome import (
    denied_connection_rows,
    find_denied_connections,
    message_lines,
    next_commands,
    outcome_summary,
    task_id_for_command,
)
from sandbox.cli.output.text_log_parser import parse_log_events
from sandbox.cli.patches import chain_changes_summary
from sandbox.cli.task_arguments import task_argument
from sandbox.model.display_text import format_budget, format_cost, format_duration
from sandbox.model.task_state import FINAL_STATES
from sandbox.model.wire.event_bodies import CONVERSATION_TYPES

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.client import Client
    from sandbox.client.response_types import Task


_STATIC_ROWS = frozenset({"Task", "Name", "Prompt", "Labels", "Repository", "Continues", "Rerun of", "Created"})
"""Rows that do not change while a task is watched."""

_OUTCOME_ROWS = ("State", "Error", "Cost", "Budget")
"""Rows that are printed first on a terminal, together with those of `_outcome_rows`."""

_COMMAND_LABELS = frozenset(
    {"Allow", "Apply", "Cancel", "Commit", "Continue", "Diff", "Logs", "Release it", "Rerun", "Shell", "Watch"}
)
_LABEL_CELLS = 12
_PROMPT_CHARACTERS_MAX = 300


@command(
    epilog=help_examples(
        "sandbox task status 5e173eb5",
        "sandbox task status 5e173eb5 --watch",
    )
)
@task_argument
@click.option("--watch", "-w", "watches", is_flag=True, help="Show events until the task ends.")
@common_options
def status(task_id: str, watches: bool) -> None:
    """Show a task.

    On a terminal, the outcome is printed first. Suggested next commands are printed last.
    """
    options = current_options()
    with options.connect() as client:
        if not watches:
            _show(client, client.status(task_id), options)
            return
        with hint_if_interrupted(task_id):
            _watch(client, task_id, options)


def _watch(client: Client, task_id: str, options: CliOptions) -> None:
    if options.format == "json":
        print_json_lines(client.events(task_id))
        return
    task = client.status(task_id)
    if task["state"] in FINAL_STATES:
        _show(client, task, options)
        return
    console = stdout_console(has_color=options.has_color)
    _print_rows(((label, value) for label, value in _rows(task, on_terminal=True) if label in _STATIC_ROWS), console)
    console.print()
    reason = PendingReasonPoller(options, task_id)
    print_events(
        _events_with_history(client, task_id),
        console,
        STATES_ONLY,
        pending_reason=reason,
        omits_failure=True,
    )
    task = client.status(task_id)
    if task["state"] in FINAL_STATES:
        click.echo(outcome_summary(task, ends_with_outcome=True, on_terminal=terminal_width(sys.stdout) is not None))


def _events_with_history(client: Client, task_id: str) -> Iterator[Mapping[str, Any]]:
    """Yield past events without the agent's messages, then all events since the latest state change or tool call."""
    last_seq = start_seq = 0
    for event in parse_log_events(client.logs(task_id, stream="events"), task_id):
        last_seq = int(event.get("seq") or last_seq)
        start_seq = last_seq if event.get("type") in {"state_change", "tool_call"} else start_seq
        yield event
    for event in client.events(task_id, after=start_seq or None):
        if event["type"] in {"output", *CONVERSATION_TYPES} or event["seq"] > last_seq:
            yield event


def _show(client: Client, task: Task, options: CliOptions) -> None:
    if options.format == "json":
        print_json(task)
        return
    denied_count, denied = find_denied_connections(client, task)
    chain_changes = chain_changes_summary(client, task)
    results = list(_result_rows(task, chain_changes))
    console = stdout_console(has_color=options.has_color)
    state_style = STATE_STYLES.get(task["state"], "")
    rows = list(_rows(task, on_terminal=console.is_terminal))
    rows += denied_connection_rows(task, denied_count, denied, on_terminal=console.is_terminal)
    commands = list(_command_rows(task, on_terminal=console.is_terminal, has_chain_changes=bool(chain_changes)))
    if not console.is_terminal:
        _print_rows([*rows, *results, *commands], console, state_style)
        return
    _print_rows(_outcome_rows(task, dict(rows), results, options.server), console, state_style)
    console.print()
    # The outcome shows the duration.
    _print_rows(
        [(label, value.partition("  after ")[0]) for label, value in rows if label not in _OUTCOME_ROWS], console
    )
    console.print()
    _print_rows(commands, console)


def _command_rows(task: Task, *, on_terminal: bool, has_chain_changes: bool) -> Iterator[tuple[str, str]]:
    """Yield the commands that are useful now."""
    yield from next_commands(task, on_terminal=on_terminal, has_chain_changes=has_chain_changes)
    if task.get("sandbox_kept"):
        shown_id = task_id_for_command(task, on_terminal=on_terminal)
        yield "Shell", f"sandbox task shell {shown_id}"
        yield "Release it", f"sandbox task release {shown_id}"


def _outcome_rows(
    task: Task, rows: Mapping[str, str], results: Iterable[tuple[str, str]], server: str
) -> Iterator[tuple[str, str]]:
    """Yield the outcome and the dashboard's address.

    rows: the rows that are printed without a terminal. results: the rows from `_result_rows`.
    """
    from sandbox.client.requests import task_page_url

    yield "State", rows["State"]
    if "Error" in rows:
        yield "Error", rows["Error"]
    yield from results
    yield from ((label, rows[label]) for label in ("Cost", "Budget") if label in rows)
    if duration := task_duration(task):
        yield "Duration", duration
    yield "Dashboard", task_page_url(server, task["id"])


def _result_rows(task: Task, chain: str) -> Iterator[tuple[str, str]]:
    """Yield the size of the patch and the agent's final message. chain: the size of the chain's patch."""
    if changes := changes_summary(task, chain):
        yield "Changes", changes
    # Older servers do not send the message.
    if (message := task.get("final_message")) and not _is_repeated(message, task):
        yield "Message", message


def _is_repeated(message: str, task: Task) -> bool:
    """Return whether the agent's last message and the error of the task are the same."""
    if not task["error"]:
        return False
    said, error = (" ".join(text.split()).rstrip(".") for text in (message, task["error"]["message"]))
    return error in said or said in error


def _print_rows(rows: Iterable[tuple[str, str]], console: Console, state_style: str = "") -> None:
    from rich.text import Text

    width_left = console.width - _LABEL_CELLS if console.is_terminal else None
    for label, value in rows:
        style = state_style if label == "State" else ""
        # A command is one line, so that it can be copied.
        cells = None if label in _COMMAND_LABELS else width_left
        lines = message_lines(value, width_left) if label == "Message" else wrap_text(value, cells)
        for number, line in enumerate(lines):
            label_text = label if number == 0 else ""
            console.print(Text.assemble((f"{label_text:<{_LABEL_CELLS}}", "dim"), (line, style)), soft_wrap=True)


def _rows(task: Task, *, on_terminal: bool) -> Iterator[tuple[str, str]]:
    yield "Task", task["id"]
    yield "Name", escape_name(task["name"])
    yield from _prompt_row(task)
    error_message = task["error"]["message"] if task["error"] else None
    message = task["state_message"] if task["state_message"] != error_message else ""
    yield "State", f"{state_text(task, on_terminal=on_terminal)}  {message or ''}".rstrip()
    if task["labels"]:
        yield "Labels", escape_name(", ".join(f"{key}={value}" for key, value in task["labels"].items()))
    yield from _repository_row(task)
    if parent := task.get("parent"):
        how = {"session": "in the agent's session", "context": "with the earlier conversation as text"}
        yield "Continues", f"{escape_name(parent)}  {how.get(str(task.get('continues')), '')}".rstrip()
    if origin := task.get("rerun_of"):
        yield "Rerun of", escape_name(origin)
    yield "Created", format_datetime(task["created_at"])
    if task["started_at"]:
        yield "Started", format_datetime(task["started_at"])
    if task["finished_at"]:
        elapsed = task_duration(task) or format_elapsed(task["started_at"], task["finished_at"])
        yield "Finished", format_datetime(task["finished_at"]) + (f"  after {elapsed}" if elapsed else "")
    if task["vm_name"] and task["vm"]:
        runtime_details = [str(task["vm"][key]) for key in ("runtime", "tier", "profile") if task["vm"].get(key)]
        if not on_terminal and task["state"] == "failed_preserved" and "sandbox_kept" in task:
            # On a terminal, the row of the state contains `preserved` or `released`.
            runtime_details.append("preserved" if task["sandbox_kept"] else "released")
        yield "Sandbox", " · ".join(dict.fromkeys(runtime_details))  # gvisor is the name of both a runtime and a tier
    yield from _host_row(task)
    yield from _attempt_rows(task)
    yield from _progress_rows(task)


def _host_row(task: Task) -> Iterator[tuple[str, str]]:
    """Yield the cluster's host and the engine's job. Older servers send neither."""
    job, host = task.get("job"), task.get("host")
    parts = [(job and job["host"]) or host]
    if job is not None:
        parts += [f"job {job['id']}" if job["id"] else None, job["reason"] if job["phase"] != "running" else None]
    if job is not None or host:
        yield "Host", " · ".join(escape_name(part) for part in parts if part)


def _attempt_rows(task: Task) -> Iterator[tuple[str, str]]:
    """Yield rows only if there are several attempts. Older servers do not send attempts."""
    attempts = task.get("attempts", [])
    for attempt in attempts if len(attempts) > 1 else []:
        error = attempt["error"]
        ended = f"{error['message']} ({error['code']})" if error else "no failure"
        yield f"Attempt {attempt['number']}", f"{'resumed · ' if attempt['resumes'] else ''}{ended}"


def _prompt_row(task: Task) -> Iterator[tuple[str, str]]:
    """Yield the beginning of the prompt, unless the task's name is the whole prompt."""
    text = shorten(task_prompt(task), _PROMPT_CHARACTERS_MAX, placeholder="…")
    if text and text != task["name"]:
        yield "Prompt", escape_name(text)


def _repository_row(task: Task) -> Iterator[tuple[str, str]]:
    match task["definition"]:
        case {"repository": {"url": url, "branch": branch, **more}}:
            commit = f" at {more['commit']}" if more.get("commit") else ""
            yield "Repository", f"{url} ({branch}{commit})"


def _budget_row(task: Task) -> Iterator[tuple[str, str]]:
    match task["definition"]:
        case {"lifecycle": {**lifecycle}}:
            progress, parts = task["progress"], []
            if limit := lifecycle.get("budget_usd"):
                parts.append(f"{format_cost(progress['cost_usd'])} of {format_budget(limit)}")
            if limit := lifecycle.get("budget_tokens"):
                parts.append(f"{progress['input_tokens'] + progress['output_tokens']:,} of {limit:,} tokens")
            if parts:
                yield "Budget", " · ".join(parts)


def _progress_rows(task: Task) -> Iterator[tuple[str, str]]:
    progress = task["progress"]
    done = [(progress["turns"], "turn"), (progress["tool_calls"], "tool call")]
    parts = [pluralize(number, noun) for number, noun in done if number]
    if activity := current_activity(progress):
        parts.append(f"{activity} now" if progress["current_tool"] else activity)
    if parts:
        yield "Work", " · ".join(parts)
    if progress["input_tokens"] or progress["output_tokens"]:
        yield "Tokens", f"{progress['input_tokens']:,} in, {progress['output_tokens']:,} out"
    if progress["cost_usd"]:
        yield "Cost", format_cost(progress["cost_usd"])
    yield from _budget_row(task)
    if chain := task.get("chain"):
        duration = format_duration(chain["duration_seconds"])
        yield "Chain", f"{pluralize(chain['tasks'], 'task')} · {format_cost(chain['cost_usd'])} · {duration}"
    if task["exit_code"] is not None:
        yield "Exit code", str(task["exit_code"])
    if task["error"]:
        yield "Error", f"{task['error'].get('message')} ({task['error'].get('code')})"
