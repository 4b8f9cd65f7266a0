"""The group `sandbox task`."""

from __future__ import annotations

import click

from sandbox.cli.lazy_group import LazyGroup
from sandbox.cli.options import common_options

ENTRIES = {
    "submit": ("sandbox.cli.commands.task.submit:submit", "Submit a manifest as a task."),
    "list": ("sandbox.cli.commands.task.list:list_tasks", "List tasks, the newest first."),
    "status": ("sandbox.cli.commands.task.status:status", "Show a task."),
    "logs": ("sandbox.cli.commands.task.logs:logs", "Print a task's output and events."),
    "wait": ("sandbox.cli.commands.task.wait:wait", "Wait until a task has ended."),
    "cancel": ("sandbox.cli.commands.task.cancel:cancel", "Cancel a task and wait for its end."),
    "artifacts": ("sandbox.cli.commands.task.artifacts:artifacts", "List a task's artifacts."),
    "download": ("sandbox.cli.commands.task.download:download", "Download artifacts and verify their checksums."),
    "diff": ("sandbox.cli.commands.task.diff:diff", "Show a task's changes as a patch."),
    "apply": ("sandbox.cli.commands.task.apply:apply", "Apply a task's changes to a git checkout."),
    "shell": ("sandbox.cli.commands.task.shell:shell", "Open a shell in a task's sandbox."),
    "attach": ("sandbox.cli.commands.task.attach:attach", "Attach to the terminal of a task's agent."),
    "release": ("sandbox.cli.commands.task.release:release", "Remove the preserved sandbox of a failed task."),
    "validate": ("sandbox.cli.commands.task.validate:validate", "Validate a manifest without a server."),
}


@click.group(cls=LazyGroup, entries=ENTRIES)
@common_options
def task() -> None:
    """Submit, watch and cancel tasks, and download their results."""
