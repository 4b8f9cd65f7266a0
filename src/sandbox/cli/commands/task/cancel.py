"""The `sandbox task cancel` command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import click

from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import confirm
from sandbox.cli.output.formatting import outcome_summary
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.terminal_text import escape_text, terminal_width
from sandbox.cli.task_arguments import task_argument
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task


@command(
    epilog=help_examples(
        'sandbox task cancel 5e173eb5 --reason "wrong branch"',
        "sandbox task cancel 5e173eb5 --yes --force",
    )
)
@task_argument
@click.option("--reason", metavar="TEXT", help="Stored with the task.")
@click.option("--force", is_flag=True, help="Do not wait for the agent to exit on its own.")
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@common_options
def cancel(task_id: str, reason: str | None, force: bool, yes: bool) -> None:
    """Cancel a task and wait until it has ended.

    The results so far are kept.
    """
    options = current_options()
    with options.connect() as client:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            _confirm(client.status(task_id))
        response = client.cancel(task_id, reason=reason, force=force)
        if sys.stderr.isatty():
            click.echo(f"{escape_text(response['message'])}", err=True)
        status = _wait_for_end(client, task_id)
    if options.format == "json":
        print_json(response)
    if status["state"] != "cancelled":
        _fail_ended(status)
    if options.format != "json":
        click.echo(outcome_summary(status), err=True)


def _confirm(status: Task) -> None:
    """Ask whether to cancel the task, unless it has ended. Exits if it has ended or the user declines."""
    if status["state"] in FINAL_STATES:
        _fail_ended(status)
    if not confirm(f"Cancel task {escape_text(status['id'])}?", default=False):
        fail("The task was not cancelled.", ExitCode.INTERRUPTED)


def _fail_ended(status: Task) -> NoReturn:
    summary = outcome_summary(status, on_terminal=terminal_width(sys.stderr) is not None)
    fail(f"The task had already ended. {summary}", ExitCode.CONFLICT)


def _wait_for_end(client: Client, task_id: str) -> Task:
    try:
        return client.wait(task_id)
    except KeyboardInterrupt:
        escaped_id = escape_text(task_id)
        message = f"\nStopped waiting; task {escaped_id} is still being cancelled."
        fail(f"{message} Force it: sandbox task cancel {escaped_id} --force", ExitCode.INTERRUPTED)
