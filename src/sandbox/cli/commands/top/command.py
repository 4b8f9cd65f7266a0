"""The `sandbox top` command."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode
from sandbox.cli.options import CliOptions, common_options, current_options
from sandbox.cli.output.console import print_json, stdout_console
from sandbox.cli.output.table import print_table


@command(
    epilog=help_examples(
        "sandbox top",
        "sandbox top --format json",
        note="Without a terminal, the command prints one table, or one object with --format json, and exits.",
    )
)
@common_options
def top() -> None:
    """Watch all tasks on one screen.

    Lists active tasks first, then pending tasks with the reason why they wait, then the tasks that ended most recently.
    Generated ids are shortened.

    Use the arrow keys to select a task, and Enter to watch it; q or Esc returns to the list. Press / to search, f to
    filter by state, c to cancel the selected task after confirmation, ? to list the keys and the filters, and q to
    quit.
    """
    options = current_options()
    if options.format != "text" or not (sys.stdout.isatty() and sys.stdin.isatty()):
        _print_once(options)
        return
    from sandbox.cli.commands.top.controller import run_top

    try:
        run_top(options)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None  # print no message: ^C is a normal way to quit


def _print_once(options: CliOptions) -> None:
    from sandbox.cli.commands.top.screen_content import COLUMNS, OMITTABLE_COLUMNS, Snapshot, fetch_snapshot, table_rows
    from sandbox.client import AsyncClient

    async def fetch() -> Snapshot:
        async with AsyncClient(options.server, options.token) as client:
            return await fetch_snapshot(client)

    snapshot = asyncio.run(fetch())
    if options.format == "json":
        print_json({"health": snapshot.health, "tasks": snapshot.tasks})
        return
    console = stdout_console(has_color=options.has_color)
    rows = table_rows(snapshot.tasks, datetime.now(UTC), on_terminal=console.is_terminal)
    if rows:
        print_table(console, COLUMNS, rows, has_border=options.format == "table", omittable=OMITTABLE_COLUMNS)
    else:
        click.echo("No tasks yet.", err=True)
