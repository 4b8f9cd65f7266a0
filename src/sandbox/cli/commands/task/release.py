"""The `sandbox task release` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import confirm
from sandbox.cli.output.terminal_text import escape_name, escape_text
from sandbox.cli.task_arguments import for_each_task, task_arguments

if TYPE_CHECKING:
    from sandbox.client.response_types import Task


@command(epilog=help_examples("sandbox task release 5e173eb5", "sandbox task release 5e173eb5 9c0ffee1 --yes"))
@task_arguments
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@common_options
def release(task_ids: Sequence[str], yes: bool) -> None:
    """Remove the preserved sandboxes of failed tasks.

    A sandbox is preserved only with lifecycle.failure_action: preserve. Artifacts and logs are kept.
    On a terminal, the command prompts before it removes files.
    """
    with current_options().connect() as client:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            _confirm([client.status(task_id) for task_id in task_ids])
        for_each_task(task_ids, client.release)


def _confirm(tasks: Sequence[Task]) -> None:
    """Ask once whether to remove the sandboxes. The server rejects the request for a task that has none."""
    shown = [f"{escape_text(task['id'])} ({escape_name(task['name'])})" for task in tasks if task.get("sandbox_kept")]
    if not shown:
        return
    if len(shown) == 1:
        question, refusal = f"Remove the preserved sandbox of task {shown[0]}?", "The sandbox was not removed."
    else:
        click.echo("\n".join(f"  {text}" for text in shown), err=True)
        question, refusal = f"Remove the preserved sandboxes of these {len(shown)} tasks?", "No sandbox was removed."
    if not confirm(question, default=False):
        fail(refusal, ExitCode.INTERRUPTED)
