"""The `sandbox admin check` command."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.settings_options import data_dir_options, load_configuration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox.server.integrity import Discrepancy


@command(
    epilog=help_examples(
        "sandbox admin check",
        "sandbox admin check --deep",
    )
)
@click.option("--deep", is_flag=True, help="Also verify the checksum of every artifact.")
@data_dir_options
@output_options("text", "json")
def check(*, deep: bool, **options: Any) -> None:
    """Check that index, journals and artifacts are consistent.

    The command only reads the data directory, so you can run it while a server is running. Exit code: 0 if everything
    is consistent, otherwise 1.
    """
    data_dir = load_configuration(options).settings.server.data_dir.absolute()
    from sandbox.bootstrap.data_dir_maintenance import check_data_dir

    tasks_count, discrepancies = check_data_dir(data_dir, deep=deep)
    if current_options().format == "json":
        print_json(
            {"clean": not discrepancies, "tasks": tasks_count, "findings": [asdict(each) for each in discrepancies]}
        )
    else:
        print_discrepancies(discrepancies)
    tasks = pluralize(tasks_count, "task")
    if discrepancies:
        count = pluralize(len(discrepancies), "problem")
        fail(f"Checked {tasks}: {count} found.", ExitCode.TASK_FAILED)
    click.echo(f"Checked {tasks}: index, journals and artifacts are consistent.", err=True)


def print_discrepancies(discrepancies: Sequence[Discrepancy]) -> None:
    """Print one discrepancy per line: task, kind, and a message with the remedy."""
    for each in discrepancies:
        click.echo(f"{escape_text(each.task_id or '-')}  {each.kind}  {escape_text(each.message)}")
