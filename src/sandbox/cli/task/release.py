"""`sandbox task release`"""

from __future__ import annotations

import click

from sandbox.cli.answer import print_json
from sandbox.cli.options import chosen, common_options
from sandbox.cli.task_argument import task_argument
from sandbox.cli.visible import visible


@click.command()
@task_argument
@common_options
def release(task_id: str) -> None:
    """Remove the sandbox that was preserved after a failure.

    Only lifecycle.failure_action: preserve keeps one. Artifacts and logs stay.
    """
    options = chosen()
    with options.connect() as client:
        answer = client.release(task_id)
    if options.format == "json":
        print_json(answer)
    else:
        click.echo(visible(answer["message"]), err=True)
