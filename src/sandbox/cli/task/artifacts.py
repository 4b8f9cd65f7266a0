"""`sandbox task artifacts`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sandbox.cli.answer import print_json
from sandbox.cli.console import output_console, print_table
from sandbox.cli.figures import size
from sandbox.cli.options import Chosen, chosen, common_options
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from rich.table import Table

    from sandbox.client.answers import ArtifactList


@click.command()
@click.argument("task_id", metavar="TASK_ID")
@common_options
def artifacts(task_id: str) -> None:
    """List what was kept from a task."""
    options = chosen()
    with options.connect() as client:
        answer = client.artifacts(task_id)
    if options.format == "json":
        print_json(answer)
    elif answer["artifacts"]:
        print_table(output_console(has_color=options.has_color), _table(answer, options))
    else:
        click.echo("No artifacts yet. They are collected when the agent has ended.", err=True)


def _table(answer: ArtifactList, options: Chosen) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim") if options.format == "text" else Table()
    table.add_column("NAME", overflow="fold")
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("TYPE", no_wrap=True, overflow="ellipsis")
    table.add_column("PATH", overflow="fold")
    for artifact in answer["artifacts"]:
        path = artifact["path"] + ("  (contains a secret)" if artifact["contains_secret"] else "")
        cells = (artifact["name"], size(artifact["size_bytes"]), artifact["content_type"], path)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table
