"""The `sandbox task artifacts` command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import print_json, stdout_console
from sandbox.cli.output.table import cell, print_table
from sandbox.cli.task_arguments import task_argument
from sandbox.model.display_text import format_size

if TYPE_CHECKING:
    from rich.text import Text

    from sandbox.client.response_types import Artifact


@command(epilog=help_examples("sandbox task artifacts 5e173eb5"))
@task_argument
@common_options
def artifacts(task_id: str) -> None:
    """List a task's artifacts."""
    options = current_options()
    with options.connect() as client:
        response = client.artifacts(task_id)
    if options.format == "json":
        print_json(response)
    elif response["artifacts"]:
        print_table(
            stdout_console(has_color=options.has_color),
            ("NAME", "SIZE", "TYPE", "PATH"),
            [_row(artifact) for artifact in response["artifacts"]],
            has_border=options.format == "table",
            omittable=("TYPE", "PATH"),
        )
    else:
        click.echo("No artifacts yet. They are collected when the agent has ended.", err=True)


def _row(artifact: Artifact) -> list[Text]:
    path = artifact["path"] + ("  (contains a secret)" if artifact["contains_secret"] else "")
    return [
        cell(text) for text in (artifact["name"], format_size(artifact["size_bytes"]), artifact["content_type"], path)
    ]
