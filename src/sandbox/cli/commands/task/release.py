"""The `sandbox task release` command."""

from __future__ import annotations

import click

from sandbox.cli.help_examples import help_examples
from sandbox.cli.lazy_group import command
from sandbox.cli.options import common_options, current_options, task_argument
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import escape_text


@command(epilog=help_examples("sandbox task release 5e173eb5"))
@task_argument
@common_options
def release(task_id: str) -> None:
    """Remove the preserved sandbox of a failed task.

    A sandbox is preserved only with lifecycle.failure_action: preserve. Artifacts and logs are kept.
    """
    options = current_options()
    with options.connect() as client:
        response = client.release(task_id)
    if options.format == "json":
        print_json(response)
    else:
        click.echo(escape_text(response["message"]), err=True)
