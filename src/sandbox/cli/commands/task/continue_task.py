"""The `sandbox task continue` command."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.submission import (
    id_override,
    parse_overrides,
    print_submitted_and_wait,
    read_prompt,
    submit_derived_task,
    wait_options,
)
from sandbox.cli.task_arguments import task_argument
from sandbox.model.manifest.overrides import Override


@command(
    "continue",
    epilog=help_examples(
        'sandbox task continue 5e173eb5 "Add a test for it." --follow',
        note="Prints only the new task's id on stdout.",
    ),
)
@task_argument
@click.argument("prompt")
@wait_options
@click.option("--id", "new_id", metavar="ID", help="The new task's id [default: generated].")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    callback=parse_overrides,
    help="Set a field of the manifest, such as lifecycle.timeout=2h; may be repeated.",
)
@common_options
def continue_task(
    task_id: str, prompt: str, waits: bool, follows: bool, new_id: str | None, overrides: list[Override]
) -> None:
    """Submit a task that continues a finished task.

    PROMPT describes the next change; '-' reads it from stdin. The new task starts with the changes of the earlier task
    and of all tasks that the earlier task continued. The agent resumes the session of the earlier task. If this is not
    possible, the agent gets the earlier conversation as text. The earlier task is not changed.
    """
    options, text = current_options(), read_prompt(prompt)
    changes = [*overrides, *([] if new_id is None else [id_override(new_id)])]
    assignments = [change.assignment for change in changes]
    with options.connect() as client:
        submitted = submit_derived_task(
            lambda: client.continue_task(task_id, text, overrides=assignments), task_id, changes
        )
        print_submitted_and_wait(client, submitted, options, waits=waits, follows=follows)
