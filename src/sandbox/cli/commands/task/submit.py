"""The command `sandbox task submit`."""

from __future__ import annotations

from typing import BinaryIO

import click

from sandbox.cli.errors import interrupt_hint
from sandbox.cli.help_examples import help_examples
from sandbox.cli.manifest_file import ManifestFile
from sandbox.cli.options import CliOptions, common_options, current_options
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import escape_text
from sandbox.cli.overrides import Override, parse_overrides
from sandbox.cli.submission import print_submitted, submit_manifest, wait_for_end


@click.command(
    epilog=help_examples(
        "sandbox task submit task.yaml --follow",
        "sandbox task submit task.yaml --set vm.cpus=16 --wait",
        note="Prints only the task's id on stdout: ID=$(sandbox task submit task.yaml) works.",
    )
)
@click.argument("file", type=click.File("rb"))
@click.option(
    "--wait",
    "-w",
    "waits",
    is_flag=True,
    help="Wait until the task ends. Exit code: 0 completed, 1 failed, 8 cancelled.",
)
@click.option("--follow", "follows", is_flag=True, help="Show events until the task ends; implies --wait.")
@click.option("--id", "task_id", metavar="ID", help="The task's id; overrides the manifest's.")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    callback=parse_overrides,
    help="Set a field of the manifest, such as vm.cpus=16 or secrets[0].key=TOKEN; may be repeated.",
)
@common_options
def submit(file: BinaryIO, waits: bool, follows: bool, task_id: str | None, overrides: list[Override]) -> None:
    """Submit a manifest as a task.

    FILE is YAML or JSON; '-' means stdin.
    """
    options, manifest = current_options(), ManifestFile.read(file)
    if task_id is not None:
        overrides.append(Override(("metadata", "id"), task_id, f"--id {task_id}"))
    with options.connect() as client:
        submitted = submit_manifest(client, manifest, overrides)
        if options.format == "json":
            print_json(submitted) if not (waits or follows) else None
        else:
            print_submitted(submitted, options.server, is_watched=waits or follows)
        if waits or follows:
            with interrupt_hint(submitted["task_id"]):
                wait_for_end(client, submitted["task_id"], options, should_follow=follows)
                _hint(submitted["task_id"], options)


def _hint(task_id: str, options: CliOptions) -> None:
    if options.format != "json":
        # Print one line per command, so that it can be copied even from a narrow window.
        escaped_id = escape_text(task_id)
        click.echo(f"  Changes:   sandbox task diff {escaped_id}", err=True)
        click.echo(f"  Artifacts: sandbox task artifacts {escaped_id}", err=True)
