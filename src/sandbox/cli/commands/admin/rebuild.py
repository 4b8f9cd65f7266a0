"""The `sandbox admin rebuild` command."""

from __future__ import annotations

from typing import Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import data_dir_options, load_configuration


@command(epilog=help_examples("sandbox admin rebuild"))
@data_dir_options
@output_options("text", "json")
def rebuild(**options: Any) -> None:
    """Rebuild the index from the journals.

    The command fails if a server is using the data directory. Damaged journals are reported and not changed; all other
    journals are indexed. The old index is kept as index.sqlite.before. Exit code: 0 if all journals were indexed,
    otherwise 1.
    """
    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    from sandbox.bootstrap.data_dir_maintenance import rebuild_index

    result = rebuild_index(data_dir)
    if current_options().format == "json":
        print_json({"tasks": result.tasks_count, "refused": dict(result.skipped)})
    else:
        for task_id, reason in result.skipped.items():
            click.echo(f"{escape_text(task_id)}  {escape_text(reason)}")
    tasks = pluralize(result.tasks_count, "task")
    if result.skipped:
        fail(f"The new index has {tasks}; {len(result.skipped)} could not be read.", ExitCode.TASK_FAILED)
    click.echo(f"The new index has {tasks}.", err=True)
