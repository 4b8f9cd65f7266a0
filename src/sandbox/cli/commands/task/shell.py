"""The `sandbox task shell` command."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import current_options, server_options
from sandbox.cli.sandbox_terminal import DETACH_KEYS, exit_with_terminal, parse_detach_keys, run_terminal
from sandbox.cli.task_arguments import task_argument


@command(epilog=help_examples("sandbox task shell 5e173eb5"))
@task_argument
@click.option(
    "--detach-keys",
    "keys",
    callback=parse_detach_keys,
    metavar="KEYS",
    default=DETACH_KEYS,
    help=f"Keys that end the shell [default: {DETACH_KEYS}]",
)
@server_options
def shell(task_id: str, keys: bytes) -> None:
    """Open a shell in a task's sandbox.

    While the task runs, the shell runs in the task's sandbox as the agent's user, without the task's secrets in its
    environment. If the sandbox is not running yet, the command waits until it is running, but at most an hour. If the
    task failed with lifecycle.failure_action: preserve, the shell runs in a new sandbox with the preserved files and
    without access to the model. If you detach, the shell ends and the command exits with code 0. If you exit the shell,
    the command exits with the shell's exit code.
    """
    result = run_terminal(current_options(), task_id, keys, of="shell")
    exit_with_terminal(result, task_id, "The shell has ended.")
