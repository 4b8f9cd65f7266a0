"""The `sandbox task attach` command."""

from __future__ import annotations

import click

from sandbox.cli.help_examples import help_examples
from sandbox.cli.lazy_group import command
from sandbox.cli.options import current_options, server_options, task_argument
from sandbox.cli.output.text import escape_text
from sandbox.cli.terminal import DETACH_KEYS, exit_with_terminal, parse_detach_keys, run_terminal


@command(
    epilog=help_examples(
        "sandbox task attach 5e173eb5",
        "sandbox task attach 5e173eb5 --watch",
    )
)
@task_argument
@click.option("--watch", is_flag=True, help="Read-only: send no input.")
@click.option(
    "--detach-keys",
    "keys",
    callback=parse_detach_keys,
    metavar="KEYS",
    default=DETACH_KEYS,
    help=f"Keys that detach [default: {DETACH_KEYS}]",
)
@server_options
def attach(task_id: str, watch: bool, keys: bytes) -> None:
    """Attach to the terminal of a task's agent.

    An agent has a terminal only if its section of the manifest sets headless: false. The first client can type; the
    others are read-only until it detaches. The agent keeps running even after all clients have detached. If the agent
    exits, this command exits with the agent's exit code.
    """
    result = run_terminal(current_options(), task_id, keys, of="agent", watch=str(watch).lower())
    escaped_id = escape_text(task_id)
    exit_with_terminal(
        result, task_id, f"\nDetached. The agent continues.\n  Attach again: sandbox task attach {escaped_id}"
    )
