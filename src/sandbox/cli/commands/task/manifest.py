"""The `sandbox task manifest` command."""

from __future__ import annotations

import json
import sys

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.task_arguments import task_argument


@command(
    epilog=help_examples(
        "sandbox task manifest 5e173eb5 > task.yaml",
        note="Submit the manifest again, with or without changes: sandbox task submit task.yaml",
    )
)
@task_argument
@common_options
def manifest(task_id: str) -> None:
    """Print a task's manifest, which you can submit again.

    Prints YAML, or JSON with --format json. The printed manifest omits the id and all fields that have their default
    values. It contains the sources of secrets, but not the values of secrets.
    """
    options = current_options()
    with options.connect() as client:
        submitted = client.manifest(task_id)
    if options.format == "json":
        print_json(submitted)
        return
    from sandbox.model.manifest.yaml import write_yaml

    text = write_yaml(json.loads(json.dumps(submitted)))  # the writer accepts no subclasses of dict
    if sys.stdout.isatty():
        text = "\n".join(map(escape_text, text.split("\n")))
    click.echo(text, nl=False)
