"""`sandbox admin rebuild`"""

from __future__ import annotations

from typing import Any

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import chosen, output_options
from sandbox.cli.output.formatting import counted
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import visible
from sandbox.cli.server_options import data_dir_options, load_configuration


@click.command()
@data_dir_options
@output_options("text", "json")
def rebuild(**options: Any) -> None:
    """Make the index anew from the journals.

    No server may work on the data directory meanwhile. A journal that is damaged stays where it is and is told; all
    others are in the new index. The old one is kept as index.sqlite.before. Exit code: 0 when every journal is in, 1
    when one is not.
    """
    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    from sandbox.bootstrap.administration import rebuild_index

    done = rebuild_index(data_dir)
    if chosen().format == "json":
        print_json({"tasks": done.tasks_count, "refused": dict(done.refused)})
    else:
        for task_id, reason in done.refused.items():
            click.echo(f"{visible(task_id)}  {visible(reason)}")
    tasks = counted(done.tasks_count, "task")
    if done.refused:
        fail(f"The new index has {tasks}; {len(done.refused)} could not be read.", ExitCode.TASK_FAILED)
    click.echo(f"The new index has {tasks}.", err=True)
