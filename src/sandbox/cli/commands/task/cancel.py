"""The `sandbox task cancel` command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, confirm, help_examples
from sandbox.cli.errors import ExitCode, fail, print_error
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import escape_name, escape_text, print_json, terminal_width
from sandbox.cli.output.task_outcome import outcome_summary
from sandbox.cli.task_arguments import task_arguments
from sandbox.model.fixed_limits import TERM_GRACE_SECONDS
from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task


@command(
    epilog=help_examples(
        'sandbox task cancel 5e173eb5 --reason "wrong branch"',
        "sandbox task cancel 5e173eb5 9c0ffee1 --yes --force",
    )
)
@task_arguments
@click.option("--reason", metavar="TEXT", help="Why the tasks are cancelled; stored with each task.")
@click.option("--force", is_flag=True, help="Do not wait for the agent to exit on its own.")
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@common_options
def cancel(task_ids: Sequence[str], reason: str | None, force: bool, yes: bool) -> None:
    """Cancel tasks and wait until they have ended.

    The results that a task has produced so far are kept. If one of several tasks cannot be cancelled, the other tasks
    are still cancelled.
    """
    options = current_options()
    with options.connect() as client:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            _confirm([client.status(task_id) for task_id in task_ids])
        code, requested = _request(client, task_ids, reason, force=force)
        for task_id in requested:
            status = _wait_for_end(client, task_id)
            if status["state"] != "cancelled":
                code = _print_ended(status)
            elif options.format != "json":
                click.echo(outcome_summary(status), err=True)
    if code is not ExitCode.SUCCESS:
        raise click.exceptions.Exit(code)


def _request(
    client: Client, task_ids: Sequence[str], reason: str | None, *, force: bool
) -> tuple[ExitCode, Sequence[str]]:
    """Request the cancellation of each task before waiting for any of them.

    Returns the exit code of the last error, and the tasks whose requests the server accepted. Raises the error if there
    is only one task.
    """
    from sandbox.client import ClientError, UnreachableError

    code, requested = ExitCode.SUCCESS, list[str]()
    for task_id in task_ids:
        try:
            response = client.cancel(task_id, reason=reason, force=force)
        except ClientError as error:
            if len(task_ids) == 1 or isinstance(error, UnreachableError):
                raise
            code = print_error(error)
            continue
        requested.append(task_id)
        if len(task_ids) == 1 and sys.stderr.isatty():
            click.echo(escape_text(response["message"]) + _grace_note(response, force=force), err=True)
        if current_options().format == "json":
            print_json(response)
    return code, requested


def _grace_note(response: Mapping[str, Any], *, force: bool) -> str:
    """Return how long the agent may take to exit; empty if it is not running or has no grace period."""
    if force or response["previous_state"] != TaskState.RUNNING:
        return ""
    return f" The agent has up to {TERM_GRACE_SECONDS:.0f} s to exit (--force skips this)."


def _confirm(tasks: Sequence[Task]) -> None:
    """Ask once whether to cancel the tasks. Exits if all of them have ended or the user declines."""
    active = [task for task in tasks if task["state"] not in FINAL_STATES]
    if not active:
        for task in tasks:
            code = _print_ended(task)
        raise click.exceptions.Exit(code)
    if len(active) == 1:
        question, refusal = f"Cancel task {escape_text(active[0]['id'])}?", "The task was not cancelled."
    else:
        for task in active:
            click.echo(f"  {escape_text(task['id'])} ({escape_name(task['name'])})", err=True)
        question, refusal = f"Cancel these {len(active)} tasks?", "No task was cancelled."
    if not confirm(question, default=False):
        fail(refusal, ExitCode.INTERRUPTED)


def _print_ended(status: Task) -> ExitCode:
    summary = outcome_summary(status, on_terminal=terminal_width(sys.stderr) is not None)
    click.echo(f"The task had already ended. {summary}", err=True)
    return ExitCode.CONFLICT


def _wait_for_end(client: Client, task_id: str) -> Task:
    try:
        return client.wait(task_id)
    except KeyboardInterrupt:
        escaped_id = escape_text(task_id)
        message = f"\nStopped waiting; task {escaped_id} is still being cancelled."
        fail(f"{message} Force it: sandbox task cancel {escaped_id} --force", ExitCode.INTERRUPTED)
