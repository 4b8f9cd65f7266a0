"""The group `sandbox admin`."""

from __future__ import annotations

import click

from sandbox.cli.lazy_group import LazyGroup
from sandbox.cli.options import common_options

ENTRIES = {
    "check": ("sandbox.cli.commands.admin.check:check", "Prove that index, journals and artifacts agree."),
    "drain": ("sandbox.cli.commands.admin.drain:drain", "Let the server finish what runs, and begin nothing."),
    "rebuild": ("sandbox.cli.commands.admin.rebuild:rebuild", "Make the index anew from the journals."),
    "prune": ("sandbox.cli.commands.admin.prune:prune", "Remove finished tasks with all that is kept of them."),
    "backup": ("sandbox.cli.commands.admin.backup:backup", "Back up tasks and tokens into a file."),
    "restore": ("sandbox.cli.commands.admin.backup:restore", "Make a data directory of a backup."),
}


@click.group(cls=LazyGroup, entries=ENTRIES)
@common_options
def admin() -> None:
    """Check, prune, back up and mend what the server keeps."""
