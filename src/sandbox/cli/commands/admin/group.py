"""The group `sandbox admin`."""

from __future__ import annotations

import click

from sandbox.cli.lazy_group import LazyGroup
from sandbox.cli.options import common_options

ENTRIES = {
    "check": ("sandbox.cli.commands.admin.check:check", "Check that index, journals and artifacts are consistent."),
    "drain": ("sandbox.cli.commands.admin.drain:drain", "Let running tasks finish, and start no new ones."),
    "rebuild": ("sandbox.cli.commands.admin.rebuild:rebuild", "Rebuild the index from the journals."),
    "prune": ("sandbox.cli.commands.admin.prune:prune", "Remove finished tasks and all their data."),
    "backup": ("sandbox.cli.commands.admin.backup:backup", "Back up tasks and tokens to a file."),
    "restore": ("sandbox.cli.commands.admin.backup:restore", "Restore a backup to a new data directory."),
}


@click.group(cls=LazyGroup, entries=ENTRIES)
@common_options
def admin() -> None:
    """Check, prune, back up and repair the server's data."""
