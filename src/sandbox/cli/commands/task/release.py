"""The `sandbox task release` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from sandbox.cli.click_extensions import command, confirm_for_tasks, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.task_arguments import for_each_task, task_arguments


@command(epilog=help_examples("sandbox task release 5e173eb5", "sandbox task release 5e173eb5 9c0ffee1 --yes"))
@task_arguments
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@common_options
def release(task_ids: Sequence[str], yes: bool) -> None:
    """Remove the preserved sandboxes of failed tasks.

    A sandbox is preserved only with lifecycle.failure_action: preserve. Artifacts and logs are kept. On a terminal, the
    command prompts for confirmation before it removes a sandbox.
    """
    with current_options().connect() as client:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            tasks = [client.status(task_id) for task_id in task_ids]
            confirm_for_tasks(
                [task for task in tasks if task.get("sandbox_kept")],  # the server rejects the request for the others
                one=("Remove the preserved sandbox of task {}?", "The sandbox was not removed."),
                several=("Remove the preserved sandboxes of these {} tasks?", "No sandbox was removed."),
            )
        for_each_task(task_ids, client.release)
