"""The `sandbox task submit` command."""

from __future__ import annotations

from typing import BinaryIO

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.submission import (
    ManifestFile,
    id_override,
    parse_overrides,
    print_submitted_and_wait,
    submit_manifest,
    wait_options,
)
from sandbox.model.manifest.overrides import Override


@command(
    epilog=help_examples(
        "sandbox task submit task.yaml --follow",
        "sandbox task submit task.yaml --set vm.cpus=16 --wait",
        note="Prints only the task's id on stdout, so ID=$(sandbox task submit task.yaml) works.",
    )
)
@click.argument("file", type=click.File("rb"))
@wait_options
@click.option("--id", "task_id", metavar="ID", help="The task's id; overrides the id in the manifest.")
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
        overrides.append(id_override(task_id))
    with options.connect() as client:
        submitted = submit_manifest(client, manifest, overrides)
        print_submitted_and_wait(client, submitted, options, waits=waits, follows=follows)
