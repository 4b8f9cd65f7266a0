"""The `sandbox task release` command."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.cli.errors import for_each_task, print_task_message
from sandbox.cli.help_examples import help_examples
from sandbox.cli.lazy_group import command
from sandbox.cli.options import common_options, current_options, task_arguments
from sandbox.cli.output.json_output import print_json


@command(epilog=help_examples("sandbox task release 5e173eb5", "sandbox task release 5e173eb5 9c0ffee1"))
@task_arguments
@common_options
def release(task_ids: Sequence[str]) -> None:
    """Remove the preserved sandboxes of failed tasks.

    A sandbox is preserved only with lifecycle.failure_action: preserve. Artifacts and logs are kept.
    """
    options = current_options()
    with options.connect() as client:

        def release_sandbox(task_id: str) -> None:
            response = client.release(task_id)
            if options.format == "json":
                print_json(response)
            else:
                print_task_message(task_ids, task_id, response["message"])

        for_each_task(task_ids, release_sandbox)
