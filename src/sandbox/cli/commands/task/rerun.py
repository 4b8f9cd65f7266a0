"""The `sandbox task rerun` command."""

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
    epilog=help_examples(
        "sandbox task rerun 5e173eb5 --follow",
        'sandbox task rerun 5e173eb5 "Fix the tests." --set vm.cpus=16',
        note="Prints only the new task's id on stdout.",
    )
)
@task_argument
@click.argument("prompt", required=False)
@wait_options
@click.option("--prompt", "prompt_option", metavar="TEXT", help="The same as PROMPT.")
@click.option("--id", "new_id", metavar="ID", help="The new task's id [default: generated].")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    callback=parse_overrides,
    help="Set a field of the manifest, such as vm.cpus=16 or secrets[0].key=TOKEN; may be repeated.",
)
@common_options
def rerun(
    task_id: str,
    prompt: str | None,
    waits: bool,
    follows: bool,
    prompt_option: str | None,
    new_id: str | None,
    overrides: list[Override],
) -> None:
    """Submit a task again.

    PROMPT replaces the prompt of the earlier task; '-' reads it from stdin.

    The new task uses the manifest of the earlier task, with the changes that you specify as options. It starts from a
    new clone. The earlier task can be in any state and is not changed.
    """
    if prompt is not None and prompt_option is not None:
        raise click.UsageError("Give the prompt as PROMPT or with --prompt, not both.")
    prompt = prompt_option if prompt is None else prompt
    options, text = current_options(), None if prompt is None else read_prompt(prompt)
    changes = [*overrides, *([] if new_id is None else [id_override(new_id)])]
    assignments = [change.assignment for change in changes]
    with options.connect() as client:
        submitted = submit_derived_task(
            lambda: client.rerun(task_id, overrides=assignments, prompt=text), task_id, changes
        )
        print_submitted_and_wait(client, submitted, options, waits=waits, follows=follows)
