"""The `sandbox admin restore` command."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.commands.admin.backup import print_remarks
from sandbox.cli.commands.admin.check import print_discrepancies
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import data_dir_options, load_configuration


@command(epilog=help_examples("sandbox admin restore sandbox.tar --data-dir /srv/restored"))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@data_dir_options
@output_options("text", "json")
def restore(file: Path, **options: Any) -> None:
    """Restore a backup to a new data directory.

    The data directory must be empty or must not exist. The command verifies the whole backup first. The restore either
    completes or leaves nothing behind. Tasks that had started end with the error host_lost. A server that uses the
    restored data directory starts the pending tasks.
    """
    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    from sandbox.bootstrap import data_dir_backup as backup_restore

    result = backup_restore.restore(file, data_dir)
    if current_options().format == "json":
        print_json(asdict(result))
    else:
        print_remarks(result.remarks)
        print_discrepancies(result.discrepancies)
        for task_id in result.lost:
            click.echo(f"{escape_text(task_id)}  was running; it has ended with the error host_lost")
    message = f"{escape_text(str(data_dir))} has {pluralize(result.tasks_count, 'task')}"
    if result.discrepancies:
        fail(f"{message}; {pluralize(len(result.discrepancies), 'problem')} found.", ExitCode.TASK_FAILED)
    command = f"sandbox serve --data-dir {shlex.quote(escape_text(str(data_dir)))}"
    advice = "If no server uses the old directory, start a server on the new one"
    click.echo(f"{message}.\n{advice}:\n  {command}", err=True)
