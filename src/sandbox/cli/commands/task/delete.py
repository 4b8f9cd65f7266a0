"""The `sandbox task delete` command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sandbox.cli.click_extensions import command, confirm_for_tasks, help_examples, require_terminal_for_prompt
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.task_outcome import task_id_for_hint
from sandbox.cli.task_arguments import for_each_task, task_arguments
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import ClientError


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

    Deleting a task also removes its logs, artifacts and preserved sandbox. If one of several tasks cannot be deleted,
    the other tasks are still deleted. To remove many tasks, use sandbox admin prune. The command prompts for
    confirmation before it deletes tasks. Without a terminal, --yes is required.
    """
    if not yes:
        require_terminal_for_prompt("Delete the task")
    with current_options().connect() as client:
        if not yes:
            tasks = [client.status(task_id) for task_id in task_ids]
            confirm_for_tasks(
                [task for task in tasks if task["state"] in FINAL_STATES],  # the server refuses to delete the others
                one=("Delete task {} and all its data?", "The task was not deleted."),
                several=("Delete these {} tasks and all their data?", "No task was deleted."),
            )
        for_each_task(task_ids, client.delete, _advise)


def _advise(error: ClientError, task_id: str) -> str:
    """Return the command that cancels the task if the error is that the task has not ended; otherwise empty."""
    from sandbox.client import TaskNotEndedError

    is_unfinished = isinstance(error, TaskNotEndedError)
    return f"  Cancel it: sandbox task cancel {task_id_for_hint(task_id)}" if is_unfinished else ""
