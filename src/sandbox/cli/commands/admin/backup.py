"""The `sandbox admin backup` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import data_dir_options, load_configuration
from sandbox.model.display_text import format_size


@command(
    epilog=help_examples(
        "sandbox admin backup sandbox.tar",
        "sandbox admin backup - | ssh backup.example.com 'cat > sandbox.tar'",
    )
)
@click.argument("file", type=click.Path(allow_dash=True))
@data_dir_options
@output_options("text", "json")
def backup(file: str, **options: Any) -> None:
    """Back up tasks and tokens to a file.

    If FILE is '-', the backup is written to stdout. The command works while a server is running. For each task, the
    backup contains the journal up to its last complete record. Damaged data is copied unchanged and reported (exit code
    1). Preserved sandboxes, images and the workspaces of running tasks are not included.
    """
    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    from sandbox.bootstrap.data_dir_backup import create_backup, stream_backup
    from sandbox.bootstrap.data_dir_maintenance import require_data_dir

    is_stdout = file == "-"
    if is_stdout:
        _check_stdout()
    require_data_dir(data_dir)
    if is_stdout:
        manifest, size_bytes = stream_backup(data_dir, sys.stdout.buffer)
    else:
        manifest = create_backup(data_dir, Path(file).absolute())
        size_bytes = Path(file).stat().st_size
    tasks_count = len({name.split("/")[1] for name in manifest.files if name.startswith("tasks/")})
    if current_options().format == "json":
        print_json({"file": file, "tasks": tasks_count, "size_bytes": size_bytes, "remarks": manifest.remarks})
    else:
        print_remarks(manifest.remarks, to_stderr=is_stdout)
    target = "The backup" if is_stdout else escape_text(file)
    message = f"{target} has {pluralize(tasks_count, 'task')}, {format_size(size_bytes)}"
    if manifest.remarks:
        fail(f"{message}; {pluralize(len(manifest.remarks), 'problem')} found.", ExitCode.TASK_FAILED)
    click.echo(f"{message}.", err=True)


def _check_stdout() -> None:
    """Refuse to write a backup to a terminal, or to mix it with a report."""
    if current_options().format == "json":
        raise click.UsageError("With --format json, standard output is for the report; write the backup to a file.")
    if sys.stdout.isatty():
        raise click.UsageError("A backup is not written to a terminal; redirect the output, or choose a file.")


def print_remarks(remarks: Any, *, to_stderr: bool = False) -> None:
    """Print the remarks about damaged data in a backup."""
    for remark in remarks:
        click.echo(escape_text(remark), err=to_stderr)
