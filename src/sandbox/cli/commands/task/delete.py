"""The `sandbox task delete` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import confirm
from sandbox.cli.output.formatting import hint_id
from sandbox.cli.output.terminal_text import escape_name, escape_text
from sandbox.cli.task_arguments import for_each_task, task_arguments
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import ClientError
    from sandbox.client.response_types import Task


@command(
    epilog=help_examples(
        "sandbox task delete 5e173eb5",
        "sandbox task delete 5e173eb5 9c0ffee1 --yes",
    )
)
@task_arguments
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@common_options
def delete(task_ids: Sequence[str], yes: bool) -> None:
    """Delete tasks that have ended, with all their data.

    Removes the logs, the artifacts and any preserved sandbox. If one task cannot be deleted, the others are still
    deleted. To remove many tasks, use sandbox admin prune. Prompts before it deletes. Without a terminal, --yes is
    required.
    """
    has_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    if not yes and not has_terminal:
        message = "Error: This command prompts for confirmation and needs a terminal."
        fail(f"{message}\n  Delete the task without a prompt: add --yes", ExitCode.USAGE)
    with current_options().connect() as client:
        if not yes:
            _confirm([client.status(task_id) for task_id in task_ids])
        for_each_task(task_ids, client.delete, _advise)


def _advise(error: ClientError, task_id: str) -> str:
    """Return the command that ends a task which has not ended; empty for another error."""
    from sandbox.client import TaskNotEndedError

    is_unfinished = isinstance(error, TaskNotEndedError)
    return f"  Cancel it: sandbox task cancel {hint_id(task_id)}" if is_unfinished else ""


def _confirm(tasks: Sequence[Task]) -> None:
    """Ask once whether to delete the tasks. The server refuses to delete a task that has not ended."""
    shown = [f"{escape_text(task['id'])} ({escape_name(task['name'])})" for task in tasks if _has_ended(task)]
    if not shown:
        return
    if len(shown) == 1:
        question, refusal = f"Delete task {shown[0]} and all its data?", "The task was not deleted."
    else:
        click.echo("\n".join(f"  {text}" for text in shown), err=True)
        question, refusal = f"Delete these {len(shown)} tasks and all their data?", "No task was deleted."
    if not confirm(question, default=False):
        fail(refusal, ExitCode.INTERRUPTED)


def _has_ended(task: Task) -> bool:
    return task["state"] in FINAL_STATES
