"""The `sandbox task release` command."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.task_arguments import for_each_task, task_arguments


@command(epilog=help_examples("sandbox task release 5e173eb5", "sandbox task release 5e173eb5 9c0ffee1"))
@task_arguments
@common_options
def release(task_ids: Sequence[str]) -> None:
    """Remove the preserved sandboxes of failed tasks.

    A sandbox is preserved only with lifecycle.failure_action: preserve. Artifacts and logs are kept.
    """
    with current_options().connect() as client:
        for_each_task(task_ids, client.release)
